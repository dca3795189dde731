"""Where models and images come from: timm, torchvision, Ultralytics, files, folders, and the demo.

`models` turns a word of the command line into a model, `weights` loads what is trained, `data` makes loaders, with
the `preprocessing` that the model was trained with.
"""
