"""Files from elsewhere, of the Hugging Face Hub or at an address: fetched once, verified, known when offline."""
