"""PEFT's adapters: what their folders say, and models with one merged into them.

    settings   adapter_config.json: what changes numbers, and what is refused by name
    targets    which parameters of a model it means, by PEFT's rules
    tensors    the file of weights, by the parameter they belong to
    merging    a model's weights with the adapter's, computed when they are read
    folders    an adapter's folder wherever a model's is taken: the base it names

How a model is trained with adapters, and how they are written, is in `opt_core.training.lora`.
"""
