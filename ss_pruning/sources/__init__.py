"""Where models and images come from: timm, torchvision, files, folders, and the demo."""
