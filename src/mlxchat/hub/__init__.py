"""Downloads from the Hugging Face Hub and URLs: fetched once, verified, cached for offline use."""
