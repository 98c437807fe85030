// Autograd on fake CUDA tensors with a CPU build of torch: shapes and devices, no kernels.
//
// A CPU build has no device guard for CUDA, so the autograd engine, which switches devices around every node, stops
// at the first fake CUDA tensor. This library registers a guard that switches nothing, and answers the two questions
// that torch asks about the machine ("which accelerator?", "how many?") with CUDA and one. Both answers are symbols
// that torch looks up when it is loaded, so this must be in the process, with its symbols global, before torch is.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <optional>

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

static Device only_device() { return Device(DeviceType::CUDA, 0); }

// torch's own do-nothing guard has no current device and no streams to speak of; autograd asks for both.
class StillGuard final : public c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
 public:
  Device getDevice() const override { return only_device(); }
  Device exchangeDevice(Device) const override { return only_device(); }
  Stream getStream(Device) const noexcept override { return the_stream(); }
  Stream getNewStream(Device, int) const override { return the_stream(); }
  Stream exchangeStream(Stream) const noexcept override { return the_stream(); }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }

 private:
  static Stream the_stream() noexcept { return Stream(Stream::DEFAULT, only_device()); }
};

class OneDevice final : public at::CUDAHooksInterface {
 public:
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};

#define REPLACES_TORCHS __attribute__((visibility("default")))

namespace at::accelerator {
REPLACES_TORCHS std::optional<c10::DeviceType> getAccelerator(bool) { return DeviceType::CUDA; }
}  // namespace at::accelerator

namespace at::detail {
REPLACES_TORCHS const at::CUDAHooksInterface& getCUDAHooks() {
  static const auto* hooks = new OneDevice();  // never destroyed: torch may ask while it exits
  return *hooks;
}
}  // namespace at::detail

extern "C" int install_fake_cuda() {
  auto& registered = c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)];
  if (registered.load() != nullptr) return 1;
  registered.store(new StillGuard());
  return 0;
}
