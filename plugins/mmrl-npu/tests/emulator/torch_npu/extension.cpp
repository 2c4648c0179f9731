// A device called "npu" for tests: PyTorch's PrivateUse1, its memory in the host's, its kernels the CPU's.
//
// It behaves like an accelerator where that matters to programs: tensors of the host and of the device do not mix,
// generators and memory belong to a device, collectives need its own backend. It can be told to refuse operators and
// types, and it records which operators reached it. It says nothing about an Ascend chip's numbers, speed or memory.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/SDPBackend.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <atomic>
#include <chrono>
#include <map>
#include <mutex>
#include <set>

#include "collectives.h"

namespace {

constexpr int kMost = 16;

int device_count = 2;
thread_local c10::DeviceIndex current = 0;
std::atomic<int64_t> allocated[kMost], peak[kMost];

std::mutex log_mutex;
std::map<std::string, int64_t> calls;         // operators that ran on the device
std::set<std::string> refused_operators;      // "aten::name" or "aten::name.overload"
std::set<c10::ScalarType> refused_types;

void check_type(c10::ScalarType type) {
  TORCH_CHECK_NOT_IMPLEMENTED(!refused_types.count(type), "npu (emulated): no tensors of type ", type);
}

// ------------------------------------------------------------------------------------------------------------- memory

struct Block {
  void* data;
  int64_t bytes;
  c10::DeviceIndex device;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  c10::free_cpu(block->data);
  allocated[block->device] -= block->bytes;
  delete block;
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? c10::alloc_cpu(bytes) : nullptr;
    int64_t now = allocated[current] += static_cast<int64_t>(bytes);
    if (now > peak[current]) peak[current] = now;
    auto* block = new Block{data, static_cast<int64_t>(bytes), current};
    return {data, block, &release, c10::Device(kNpu, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Allocator allocator;
REGISTER_ALLOCATOR(kNpu, &allocator);

// --------------------------------------------------------------------------------------------------------- generators

struct Generator final : at::CPUGeneratorImpl {
  explicit Generator(c10::DeviceIndex index) {
    device_ = c10::Device(kNpu, index < 0 ? 0 : index);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

at::Generator& default_generator(c10::DeviceIndex index) {
  static std::vector<at::Generator> all = [] {
    std::vector<at::Generator> made;
    for (int i = 0; i < kMost; i++) made.push_back(at::make_generator<Generator>(i));
    return made;
  }();
  return all[index < 0 ? current : index];
}

// ---------------------------------------------------------------------------------------------------- guard and hooks

struct Guard final : c10::impl::DeviceGuardImplInterface {
  using Device = c10::Device;
  using Index = c10::DeviceIndex;
  using Moment = std::chrono::steady_clock::time_point;
  using Stream = c10::Stream;
  c10::DeviceType type() const override { return kNpu; }
  Device exchangeDevice(Device device) const override {
    Index before = current;
    current = device.index();
    return {kNpu, before};
  }
  Device getDevice() const override { return {kNpu, current}; }
  void setDevice(Device device) const override { current = device.index(); }
  void uncheckedSetDevice(Device device) const noexcept override { current = device.index(); }
  Stream getStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getNewStream(Device device, int) const override { return Stream(Stream::DEFAULT, device); }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  Index deviceCount() const noexcept override { return static_cast<Index>(device_count); }
  // work is done when a call returns, so an event is a moment of the host's clock, and has happened
  void record(void** event, const Stream&, const Index, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new Moment;
    *static_cast<Moment*>(*event) = std::chrono::steady_clock::now();
  }
  void destroyEvent(void* event, const Index) const noexcept override { delete static_cast<Moment*>(event); }
  double elapsedTime(void* from, void* to, const Index) const override {
    auto passed = *static_cast<Moment*>(to) - *static_cast<Moment*>(from);
    return std::chrono::duration<double, std::milli>(passed).count();
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const Index) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  using Index = c10::DeviceIndex;
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return device_count > 0; }
  bool hasPrimaryContext(Index) const override { return true; }
  Index deviceCount() const override { return static_cast<Index>(device_count); }
  void setCurrentDevice(Index index) const override { current = index; }
  Index getCurrentDevice() const override { return current; }
  Index exchangeDevice(Index index) const override { return maybeExchangeDevice(index); }
  Index maybeExchangeDevice(Index index) const override {
    Index before = current;
    if (index >= 0) current = index;
    return before;
  }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  bool isPinnedPtr(const void*) const override { return false; }
  at::Device getDeviceFromPtr(void*) const override { return {kNpu, current}; }
  const at::Generator& getDefaultGenerator(Index index) const override { return default_generator(index); }
  at::Generator getNewGenerator(Index index) const override { return at::make_generator<Generator>(index); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), bytes);
  }
};

// ------------------------------------------------------------------------------ what must not go through the fallback

using Sizes = c10::SymIntArrayRef;
using OptionalDevice = std::optional<at::Device>;
using OptionalFormat = std::optional<at::MemoryFormat>;
using OptionalLayout = std::optional<at::Layout>;
using OptionalType = std::optional<at::ScalarType>;

c10::Device place(const OptionalDevice& device) {
  return device && device->has_index() ? *device : c10::Device(kNpu, current);
}

at::Tensor empty(Sizes sizes, OptionalType type, OptionalLayout, OptionalDevice device, std::optional<bool>,
                 OptionalFormat format) {
  check_type(c10::dtype_or_default(type));
  c10::DeviceGuard guard(place(device));
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(sizes), &allocator,
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(type),
                                   format);
}

at::Tensor empty_strided(Sizes sizes, Sizes strides, OptionalType type, OptionalLayout, OptionalDevice device,
                         std::optional<bool>) {
  check_type(c10::dtype_or_default(type));
  c10::DeviceGuard guard(place(device));
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides),
                                           &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(type));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  at::AutoDispatchBelowADInplaceOrView below;
  at::Tensor source = host(from);
  if (from.is_conj()) source = source.conj();
  if (from.is_neg()) source = source._neg_view();
  host(to).copy_(source);
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const at::Tensor& tensor) { return at::_local_scalar_dense(host(tensor)); }

const at::Tensor& resize(const at::Tensor& tensor, Sizes sizes, OptionalFormat format) {
  auto* implementation = tensor.unsafeGetTensorImpl();
  at::native::resize_impl_cpu_(implementation, C10_AS_INTARRAYREF_SLOW(sizes), std::nullopt, true);
  if (format && *format != at::MemoryFormat::Preserve) implementation->empty_tensor_restride(*format);
  return tensor;
}

at::Tensor as_strided(const at::Tensor& tensor, Sizes sizes, Sizes strides, std::optional<c10::SymInt> offset) {
  auto start = offset ? std::optional<int64_t>(offset->guard_int(__FILE__, __LINE__)) : std::nullopt;
  return at::native::as_strided_tensorimpl(tensor, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides),
                                           start);
}

at::Tensor view(const at::Tensor& tensor, Sizes sizes) {
  return at::native::view(tensor, C10_AS_INTARRAYREF_SLOW(sizes));
}

at::Tensor reshape_alias(const at::Tensor& tensor, Sizes sizes, Sizes strides) {
  return at::native::_reshape_alias(tensor, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides));
}

at::Tensor& set_tensor(at::Tensor& result, const at::Tensor& source) { return at::native::set_tensor_(result, source); }

at::Tensor& set_storage(at::Tensor& result, at::Storage source) { return at::native::set_(result, source); }

at::Tensor& set_storage_offset(at::Tensor& result, at::Storage source, c10::SymInt offset, Sizes sizes,
                               Sizes strides) {
  return at::native::set_storage_cpu_(result, source, offset.guard_int(__FILE__, __LINE__),
                                      C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides));
}

// `parameter.data = device_tensor`, which moves a module's parameters in place
bool may_replace(const at::Tensor& tensor, const at::Tensor& data) {
  auto dense = [](const at::Tensor& t) { return t.device().is_cpu() || t.device().type() == kNpu; };
  return dense(tensor) && dense(data) && !tensor.is_sparse() && !data.is_sparse();
}

using Ints = c10::IntArrayRef;

void record(const std::string& name) {
  std::lock_guard<std::mutex> lock(log_mutex);
  calls[name]++;
}

// PrivateUse1 convolutions go to operators of their own, which have no CPU kernel
at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       Ints stride, Ints padding, Ints dilation, bool transposed, Ints output_padding,
                       int64_t groups) {
  record("aten::convolution_overrideable");
  auto of_host = bias && bias->defined() ? std::optional<at::Tensor>(bias->cpu()) : bias;
  return at::convolution(x.cpu(), weight.cpu(), of_host, stride, padding, dilation, transposed, output_padding, groups)
      .to(x.device());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& gradient, const at::Tensor& x, const at::Tensor& weight, Ints stride, Ints padding,
    Ints dilation, bool transposed, Ints output_padding, int64_t groups, std::array<bool, 3> wanted) {
  record("aten::convolution_backward_overrideable");
  std::vector<int64_t> bias{gradient.size(1)};
  auto [of_x, of_weight, of_bias] =
      at::convolution_backward(gradient.cpu(), x.cpu(), weight.cpu(), at::OptionalIntArrayRef(bias), stride, padding,
                               dilation, transposed, output_padding, groups, wanted);
  auto back = [&](const at::Tensor& t) { return t.defined() ? t.to(x.device()) : t; };
  return {back(of_x), back(of_weight), back(of_bias)};
}

// One kernel in torch_npu; here the one that a CPU takes for the same tensors.
at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const std::optional<at::Tensor>& mask, double dropout, bool causal, std::optional<double> scale,
                     bool grouped) {
  record("aten::scaled_dot_product_attention");
  auto on_host = mask ? std::optional<at::Tensor>(host(*mask)) : mask;
  auto choice = at::_fused_sdp_choice(host(query), host(key), host(value), on_host, dropout, causal, scale, grouped);
  if (static_cast<at::SDPBackend>(choice) != at::SDPBackend::flash_attention)
    return std::get<0>(at::_scaled_dot_product_attention_math(query, key, value, mask, dropout, causal, std::nullopt,
                                                              scale, grouped));
  auto added = mask;
  if (mask && mask->scalar_type() == at::kBool)
    added = at::zeros_like(*mask, query.options()).masked_fill(mask->logical_not(), -INFINITY);
  return std::get<0>(
      at::_scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout, causal, added, scale));
}

// ------------------------------------------------------------------------------------------------------- the fallback

bool may_mix(const std::string& name) {  // operators that take host tensors on any device
  return name == "aten::index" || name.find("index_put") != std::string::npos ||
         name.find("copy") != std::string::npos || name.find("set_") != std::string::npos;
}

void check_devices(const std::string& name, const torch::jit::Stack& stack, size_t arguments) {
  bool device = false, other = false;
  for (size_t i = stack.size() - arguments; i < stack.size(); i++) {
    if (!stack[i].isTensor() || !stack[i].toTensor().defined()) continue;
    const auto& tensor = stack[i].toTensor();
    if (tensor.device().type() == kNpu) device = true;
    else if (tensor.device().is_cpu() && tensor.dim() > 0) other = true;
  }
  TORCH_CHECK(!(device && other), "Expected all tensors to be on the same device, but found at least two devices, npu "
              "and cpu! (", name, ")");
}

bool takes_generator(const c10::Argument& argument) {
  auto type = argument.type();
  if (type->kind() == c10::TypeKind::GeneratorType) return true;
  return type->kind() == c10::TypeKind::OptionalType &&
         type->castRaw<c10::OptionalType>()->getElementType()->kind() == c10::TypeKind::GeneratorType;
}

// Runs the CPU kernel; a generator of the device is lent to it as a CPU one with the same state.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string name = schema.name(), full = c10::toString(schema.operator_name());
  if (name.find("_for_cpu") == std::string::npos) record(full);  // `attention` has recorded itself
  TORCH_CHECK_NOT_IMPLEMENTED(!refused_operators.count(name) && !refused_operators.count(full),
                              "npu (emulated): no operator ", full);
  const auto& arguments = schema.arguments();
  if (!may_mix(name)) check_devices(name, *stack, arguments.size());
  at::Generator ours, lent;
  for (size_t i = 0; i < arguments.size(); i++) {
    if (!takes_generator(arguments[i])) continue;
    auto& value = (*stack)[stack->size() - arguments.size() + i];
    ours = value.isNone() ? default_generator(-1) : value.toGenerator();
    if (ours.device().type() != kNpu) {
      ours = at::Generator();
      continue;
    }
    lent = at::detail::createCPUGenerator();
    lent.set_state(at::Tensor(ours.get_state()));
    value = lent;
  }
  at::native::cpu_fallback(op, stack);
  if (ours.defined()) ours.set_state(lent.get_state());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("resize_", resize);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("view", view);
  m.impl("_has_compatible_shallow_copy_type", may_replace);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage_offset);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("scaled_dot_product_attention", attention);
  // one kernel each on a CPU and in torch_npu; a formula of smaller ones for devices that do not say so
  for (const char* name : {"silu_backward", "mish_backward", "native_layer_norm", "native_group_norm", "addr"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) { m.impl("scaled_dot_product_attention", attention); }
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

// ----------------------------------------------------------------------------------------------------------- autocast

using namespace at::autocast;
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FULL(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(FULL)
}

struct Registration {
  Registration() {
    static Hooks hooks;
    at::RegisterPrivateUse1HooksInterface(&hooks);
  }
} registration;

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("hccl_over", [](c10::intrusive_ptr<c10d::Backend> gloo) -> c10::intrusive_ptr<c10d::Backend> {
    return c10::make_intrusive<Hccl>(gloo);
  });
  m.def("device_count", [] { return device_count; });
  m.def("current_device", [] { return static_cast<int>(current); });
  m.def("set_device", [](int index) {
    TORCH_CHECK(index >= 0 && index < device_count, "npu (emulated): no device ", index);
    current = static_cast<c10::DeviceIndex>(index);
  });
  m.def("memory_allocated", [](int index) { return allocated[index].load(); });
  m.def("max_memory_allocated", [](int index) { return peak[index].load(); });
  m.def("reset_peak", [](int index) { peak[index] = allocated[index].load(); });
  m.def("default_generator", [](int index) { return default_generator(static_cast<c10::DeviceIndex>(index)); });
  m.def("calls", [] {
    std::lock_guard<std::mutex> lock(log_mutex);
    return calls;
  });
  m.def("refuse_operator", [](const std::string& name) { refused_operators.insert(name); });
  m.def("refuse_type", [](c10::ScalarType type) { refused_types.insert(type); });
}
