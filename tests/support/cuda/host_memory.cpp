// Views of a tensor's memory under another device: host memory that torch takes for a GPU's, and back. Compiled by stub.py.
#include <ATen/ATen.h>
#include <torch/library.h>

namespace {

at::Tensor described(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_storage_offset(like.storage_offset());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides());
  return made;
}

at::Tensor relabeled(const at::Tensor& x, c10::Device device, c10::DispatchKey key) {
  auto* kept = new c10::Storage(x.storage());
  c10::DataPtr data(kept->mutable_data(), kept, [](void* one) { delete static_cast<c10::Storage*>(one); }, device);
  c10::Storage storage(c10::Storage::use_byte_size_t{}, kept->nbytes(), std::move(data), nullptr, /*resizable=*/false);
  return described(std::move(storage), key, x);
}

at::Tensor as_cuda(const at::Tensor& x) {
  return relabeled(x, c10::Device(c10::kCUDA, 0), c10::DispatchKey::CUDA);
}

at::Tensor as_cpu(const at::Tensor& x) {
  return relabeled(x, c10::Device(c10::kCPU), c10::DispatchKey::CPU);
}

at::Tensor view_of(const at::Tensor& base, const at::Tensor& like) {
  return described(c10::Storage(base.storage()), c10::DispatchKey::CUDA, like);
}

}  // namespace

TORCH_LIBRARY(mtr_host_memory, m) {
  m.def("as_cuda(Tensor x) -> Tensor");
  m.def("as_cpu(Tensor x) -> Tensor");
  m.def("view_of(Tensor base, Tensor like) -> Tensor");  // of base's memory, with the shape of another
  m.impl("as_cuda", c10::DispatchKey::CPU, TORCH_FN(as_cuda));
  m.impl("as_cpu", c10::DispatchKey::CUDA, TORCH_FN(as_cpu));
  m.impl("view_of", c10::DispatchKey::CUDA, TORCH_FN(view_of));
}
