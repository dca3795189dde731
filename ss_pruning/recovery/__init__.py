"""Recovery: bring a pruned model's feature maps back to the dense model's, on images without labels."""
