"""What training minimises: linear_cross_entropy, next_token, preference."""
