"""deepscale: how deep can I train, what makes it trainable, and what do the gradients do on the way?"""
