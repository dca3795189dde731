"""Where models and images come from: timm, torchvision, Ultralytics, files, folders, and the demo."""
