"""Gradient clipping and (L0, L1)-smoothness, after Zhang, He, Sra and Jadbabaie (ICLR 2020)."""
