"""What a notebook shows: live plots and comparisons."""
