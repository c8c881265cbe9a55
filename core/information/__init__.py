"""Information of words about an image: in total, by region and by log-SNR, with standard errors."""
