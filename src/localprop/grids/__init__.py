"""Operations on grids, (batch, channels, height, width), whose backward is repeatable on CUDA."""
