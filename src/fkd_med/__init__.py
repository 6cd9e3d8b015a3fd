"""fkd-med: federated knowledge distillation for medical image segmentation."""
