"""What the user gives, in the form that a backbone takes."""
