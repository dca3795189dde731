"""Repair what stays: what pruned channels carried is moved onto the kept ones, without labels."""
