"""The workload that every peer runs, in plain numbers: a small DDPM UNet on 32x32 images, and DDIM with 50 steps.

Linear betas 1e-4 to 0.02, T = 1000, eps prediction, mean squared error, uniform t, Adam, one average of the
parameters, the loss fetched after every step; DDIM with eta 0 and no guidance. Nothing is imported here, so that any
Python can read it.
"""

BATCH, SIZE, CHANNELS = 16, 32, 3
BASE_CHANNELS, CHANNEL_MULT, RES_BLOCKS = 32, (1, 2, 2), 2
ATTENTION_FACTOR, HEADS = 2, 8  # attention where the image is 16x16, and in the middle
CHAIN_LENGTH, DDIM_STEPS = 1000, 50
LEARNING_RATE, EMA_DECAY = 2e-4, 0.9999
PARAMETERS = 1_624_323  # of diffusers' UNet2DModel with these numbers; jaxdiff's must have as many
