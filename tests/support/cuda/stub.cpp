// A CUDA device for torch's CPU build, as far as fake tensors and code generation ask for one: index 0, one stream, no
// memory and no kernels. Compiled and loaded by stub.py.
#include <ATen/core/Generator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::DeviceIndex;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  using D = c10::Device;
  using S = c10::Stream;
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  D exchangeDevice(D) const override { return D(type(), 0); }
  D getDevice() const override { return D(type(), 0); }
  void setDevice(D) const override {}
  void uncheckedSetDevice(D) const noexcept override {}
  S getStream(D) const override { return S(S::DEFAULT, D(type(), 0)); }
  S getNewStream(D, int) const override { return S(S::DEFAULT, D(type(), 0)); }
  S exchangeStream(S) const override { return S(S::DEFAULT, D(type(), 0)); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const S&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const S&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const S&) const override { return true; }
  void synchronizeStream(const S&) const override {}
};

struct CUDAHooks : at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  int getNumGPUs() const override { return 1; }
  bool isPinnedPtr(const void*) const override { return false; }
};

using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

namespace {
Guard guard;
c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);
}  // namespace
