// The device's memory seen from the host, and its collectives: gloo on the same memory.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>

constexpr auto kNpu = c10::DeviceType::PrivateUse1;

// A host tensor over the memory of a device tensor, which it keeps alive.
inline at::Tensor host(const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.device().type() != kNpu) return tensor;
  return at::for_blob(tensor.data_ptr(), tensor.sizes())
      .strides(tensor.strides())
      .deleter([tensor](void*) {})
      .options(tensor.options().device(at::kCPU).requires_grad(false))
      .make_tensor();
}

using Tensors = std::vector<at::Tensor>;
using Work = c10::intrusive_ptr<c10d::Work>;

inline Tensors host(const Tensors& tensors) {
  Tensors made;
  for (const auto& tensor : tensors) made.push_back(host(tensor));
  return made;
}

inline std::vector<Tensors> host(const std::vector<Tensors>& lists) {
  std::vector<Tensors> made;
  for (const auto& tensors : lists) made.push_back(host(tensors));
  return made;
}

struct Hccl final : c10d::Backend {
  c10::intrusive_ptr<c10d::Backend> gloo;
  explicit Hccl(c10::intrusive_ptr<c10d::Backend> backend)
      : c10d::Backend(backend->getRank(), backend->getSize()), gloo(std::move(backend)) {}
  const std::string getBackendName() const override { return "hccl"; }
  Work allreduce(Tensors& t, const c10d::AllreduceOptions& o) override {
    auto of = host(t);
    return gloo->allreduce(of, o);
  }
  Work broadcast(Tensors& t, const c10d::BroadcastOptions& o) override {
    auto of = host(t);
    return gloo->broadcast(of, o);
  }
  Work reduce(Tensors& t, const c10d::ReduceOptions& o) override {
    auto of = host(t);
    return gloo->reduce(of, o);
  }
  Work allgather(std::vector<Tensors>& r, Tensors& t, const c10d::AllgatherOptions& o) override {
    auto to = host(r);
    auto of = host(t);
    return gloo->allgather(to, of, o);
  }
  Work _allgather_base(at::Tensor& r, at::Tensor& t, const c10d::AllgatherOptions& o) override {
    auto to = host(r), of = host(t);
    return gloo->_allgather_base(to, of, o);
  }
  Work allgather_into_tensor_coalesced(Tensors& r, Tensors& t, const c10d::AllgatherOptions& o) override {
    auto to = host(r), of = host(t);
    return gloo->allgather_into_tensor_coalesced(to, of, o);
  }
  Work reduce_scatter_tensor_coalesced(Tensors& r, Tensors& t, const c10d::ReduceScatterOptions& o) override {
    auto to = host(r), of = host(t);
    return gloo->reduce_scatter_tensor_coalesced(to, of, o);
  }
  Work allreduce_coalesced(Tensors& t, const c10d::AllreduceCoalescedOptions& o) override {
    auto of = host(t);
    return gloo->allreduce_coalesced(of, o);
  }
  Work gather(std::vector<Tensors>& r, Tensors& t, const c10d::GatherOptions& o) override {
    auto to = host(r);
    auto of = host(t);
    return gloo->gather(to, of, o);
  }
  Work scatter(Tensors& r, std::vector<Tensors>& t, const c10d::ScatterOptions& o) override {
    auto to = host(r);
    auto of = host(t);
    return gloo->scatter(to, of, o);
  }
  Work reduce_scatter(Tensors& r, std::vector<Tensors>& t, const c10d::ReduceScatterOptions& o) override {
    auto to = host(r);
    auto of = host(t);
    return gloo->reduce_scatter(to, of, o);
  }
  Work _reduce_scatter_base(at::Tensor& r, at::Tensor& t, const c10d::ReduceScatterOptions& o) override {
    auto to = host(r), of = host(t);
    return gloo->_reduce_scatter_base(to, of, o);
  }
  Work alltoall_base(at::Tensor& r, at::Tensor& t, std::vector<int64_t>& x, std::vector<int64_t>& y,
                     const c10d::AllToAllOptions& o) override {
    auto to = host(r), of = host(t);
    return gloo->alltoall_base(to, of, x, y, o);
  }
  Work send(Tensors& t, int to, int tag) override {
    auto of = host(t);
    return gloo->send(of, to, tag);
  }
  Work recv(Tensors& t, int from, int tag) override {
    auto of = host(t);
    return gloo->recv(of, from, tag);
  }
  Work barrier(const c10d::BarrierOptions& o) override { return gloo->barrier(o); }
};
