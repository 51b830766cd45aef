"""What lies beside the tensors: where each file comes from, what differs, and what has to change."""
