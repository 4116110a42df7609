"""TensorFlow without the passes that rewrite a graph before it runs.

Programs of tests run once or twice: rewriting them takes longer than that saves.
"""

import tensorflow as tf

tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
