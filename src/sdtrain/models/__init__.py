"""Models as Diffusers and Transformers hold them: the parts of a base, pipelines around them, averages of weights."""
