"""Knowledge distillation: a teacher behind an endpoint answers questions, and its answers become a mixture."""
