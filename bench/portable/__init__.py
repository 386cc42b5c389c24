"""What `bench/portability.py` carries from machine to machine: an application, and what makes its model."""
