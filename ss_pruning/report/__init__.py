"""What a run did: records, as a table, as JSON and as one HTML page."""
