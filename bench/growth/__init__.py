"""How the fused step grows: beside its floor, with threads and sizes, and by form."""
