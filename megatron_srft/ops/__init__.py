"""Numerical kernels: one public function per operation, each with a closed-form backward."""
