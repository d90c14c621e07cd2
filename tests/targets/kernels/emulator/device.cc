// A GPU for TVM's runtime that is this machine's memory, and modules of kernels whose functions Python provides.
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/runtime/device_api.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace ffi = tvm::ffi;

class HostMemory final : public tvm::runtime::DeviceAPI {
 public:
  void SetDevice(tvm::Device) final {}
  void GetAttr(tvm::Device, tvm::runtime::DeviceAttrKind kind, ffi::Any* value) final {
    if (kind == tvm::runtime::kExist) *value = 1;
  }
  void* AllocDataSpace(tvm::Device, size_t bytes, size_t, DLDataType) final {
    void* found = nullptr;  // no byte more than was asked for, so that a sanitizer sees what is read or written beside it
    if (posix_memalign(&found, 256, std::max<size_t>(bytes, 1))) abort();
    memset(found, 0xff, bytes);  // NaN: nobody may rely on zeros
    return found;
  }
  void FreeDataSpace(tvm::Device, void* pointer) final { free(pointer); }
  void StreamSync(tvm::Device, TVMStreamHandle) final {}
  void SetStream(tvm::Device, TVMStreamHandle) final {}

 protected:
  void CopyDataFromTo(const void* from, size_t from_at, void* to, size_t to_at, size_t bytes, tvm::Device, tvm::Device, DLDataType,
                      TVMStreamHandle) final {
    memcpy(static_cast<char*>(to) + to_at, static_cast<const char*>(from) + from_at, bytes);
  }
};

class EmulatedModule final : public ffi::ModuleObj {
 public:
  explicit EmulatedModule(ffi::Function get) : get_(get) {}
  const char* kind() const final { return "cuda"; }
  ffi::Optional<ffi::Function> GetFunction(const ffi::String& name) final { return get_(name).cast<ffi::Optional<ffi::Function>>(); }

 private:
  ffi::Function get_;
};

TVM_FFI_STATIC_INIT_BLOCK() {
  namespace refl = ffi::reflection;
  refl::GlobalDef()
      .def_packed("device_api.cuda", [](ffi::PackedArgs, ffi::Any* value) {
        static HostMemory api;
        *value = static_cast<void*>(static_cast<tvm::runtime::DeviceAPI*>(&api));
      })
      .def("emulator.module", [](ffi::Function get) { return ffi::Module(ffi::make_object<EmulatedModule>(get)); });
}
