"""Triton kernels and their PyTorch operators; nothing of zsseg is known here."""
