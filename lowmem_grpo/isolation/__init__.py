"""Child processes for what a model wrote and what a user brought, and what these may touch."""
