"""What people see: figures, the report, the terminal summary and notebook tables; reads result objects, never a model."""
