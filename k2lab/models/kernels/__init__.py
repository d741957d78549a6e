"""The kernels under the models: Triton and Gluon programs, cuDNN's and PyTorch's fused attention, the linear layers around KDA.

Whoever calls a kernel (`attention_gpu`, `experts_gpu`, `kda_gpu`, `losses_gpu`, `norm`, ...) decides whether it takes a tensor,
and says once where it does not. Modules named `*_triton` and `*_gluon` need triton to be imported, so callers import them inside
functions, on CUDA only. `attention_cudnn`, `attention_flash`, `kda_choices` and `kda_linear` need only torch to be imported;
nvidia-cudnn-frontend, triton and flash-linear-attention are asked for when they run. `kda_cache/` holds tuned choices per device.
"""
