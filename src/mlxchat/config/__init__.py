"""What a configuration is: its sections and their fields."""
