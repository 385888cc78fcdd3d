"""What a factored weight does in the functions of torch.

product_tensor   a tensor without storage that stands for the product of its factors
table            linear, matmul, embedding; and the table of all functions that run on factors
tensors          convolutions and bilinear layers
attention        torch's multi-head attention
shapes           transposes, casts, splits: they stay factored
dense            everything else: metadata, refused writes, the dense tensor
matrix           reading a weight as U M Vᵀ in any orientation
cost             factored or materialized: the one cost function
"""
