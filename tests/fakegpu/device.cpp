// The device "cuda" for a CPU build of torch. Its tensors are ordinary torch tensors, which
// dispatcher, autograd and autocast treat as on a real GPU, but nothing is computed:
//
//   * memory is counted, against the size of a card, and only reserved: pages that nobody writes
//     to cost nothing, so tensors of many GB fit into any machine;
//   * an operator runs on tensors without memory (torch's Meta device), which gives the shapes,
//     types and errors of its results;
//   * small tensors whose numbers are known, as those of masks, indices and tokens, are computed on
//     the CPU as well, so that boolean indexing, .tolist() and .item() work.
//
// What makes the host wait for the GPU is reported to a listener: copies, .item(), nonzero.
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <set>
#include <string>
#include <unordered_map>
#include <vector>

using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;

static const c10::Device CUDA(c10::DeviceType::CUDA, 0);


// ---- 1. Events ----------------------------------------------------------------------------------

// kind: "allocate", or what makes the host wait. It gives the number of the line that is running.
using Listener = int64_t (*)(const char* kind);
static Listener listener = nullptr;

static int64_t tell(const char* kind) { return listener ? listener(kind) : 0; }


// ---- 2. Memory ----------------------------------------------------------------------------------

static const int64_t GRANULE = 512;        // torch's caching allocator rounds up to it
static const int64_t LARGE = 1 << 20;      // bytes: of blocks from here on we know the line
static int64_t total = INT64_MAX;
static int64_t used = 0;
static int64_t peak = 0;
static int64_t noted_peak = 0;
static double flops = 0;
static std::vector<int64_t> held;           // bytes of large blocks, by the line that made them
static std::vector<int64_t> held_at_peak;

struct Block {
  void* memory;
  int64_t bytes;
  int64_t line;      // that allocated it
  bool known;        // whether the numbers in it are those that a GPU would have
};

static void release(void* context) {
  auto block = static_cast<Block*>(context);
  used -= block->bytes;
  if (block->bytes >= LARGE) {
    held[block->line] -= block->bytes;
    munmap(block->memory, block->bytes);
  } else {
    free(block->memory);
  }
  delete block;
}

struct CardAllocator : c10::Allocator {
  c10::DataPtr allocate(size_t requested) override {
    if (requested == 0) return {nullptr, CUDA};
    int64_t bytes = (requested + GRANULE - 1) / GRANULE * GRANULE;
    TORCH_CHECK_WITH(
        OutOfMemoryError, used + bytes <= total, "CUDA out of memory. Tried to allocate ", bytes,
        " bytes; ", used, " of ", total, " bytes are in use.");

    // New memory counts as known: it is all zeros here, and whoever reads it before writing to it
    // finds arbitrary numbers on a GPU, too.
    auto block = new Block{nullptr, bytes, 0, true};
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    block->memory = bytes >= LARGE ? mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0)
                                   : calloc(1, bytes);
    TORCH_CHECK(block->memory != nullptr && block->memory != MAP_FAILED, "no address space left");

    used += bytes;
    if (bytes >= LARGE) {
      block->line = tell("allocate");
      if (held.size() <= size_t(block->line)) held.resize(block->line + 1);
      held[block->line] += bytes;
    }
    peak = std::max(peak, used);
    // Often enough for a table: whenever the peak is 0.3% above the one that was noted last.
    if (peak > noted_peak + noted_peak / 333 + LARGE) {
      noted_peak = peak;
      held_at_peak = held;
    }
    return {block->memory, block, release, CUDA};
  }

  void copy_data(void*, const void*, size_t) const override {}
};

static CardAllocator card;

// Host memory from which the GPU copies without making the host wait.
static std::set<const void*> pinned;

struct PinnedAllocator : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = malloc(bytes + 1);
    pinned.insert(memory);
    return {memory, memory, unpin, c10::Device(c10::DeviceType::CPU)};
  }
  static void unpin(void* memory) {
    pinned.erase(memory);
    free(memory);
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

static PinnedAllocator pinned_memory;

static Block* block_of(const Tensor& tensor) {
  return static_cast<Block*>(tensor.storage().data_ptr().get_context());
}

static bool is_known(const Tensor& tensor) {
  if (!tensor.is_cuda()) return true;
  Block* block = block_of(tensor);
  return block == nullptr || block->known;
}

static void set_known(const Tensor& tensor, bool known) {
  Block* block = tensor.is_cuda() ? block_of(tensor) : nullptr;
  if (block) block->known = known;
}


// ---- 3. Tensors of a call on another device -----------------------------------------------------

// Stand-ins for the tensors of a call: the same shapes, strides and aliases, on Meta (without
// memory) or on the CPU (on the very memory of the CUDA tensor).
struct StandIns {
  c10::DeviceType type;
  std::unordered_map<c10::StorageImpl*, c10::Storage> storages;      // of originals -> stand-ins
  std::unordered_map<c10::StorageImpl*, Tensor> originals;           // a tensor that lies in it
  std::unordered_map<c10::TensorImpl*, Tensor> tensors;              // of stand-ins -> originals
  std::vector<Tensor> alive;

  Tensor of(const Tensor& original) {
    if (!original.defined() || original.device().type() == type) return original;

    auto key = original.storage().unsafeGetStorageImpl();
    if (!storages.count(key)) {
      void* memory = type == c10::DeviceType::CPU ? original.storage().mutable_data() : nullptr;
      c10::Storage storage(
          c10::Storage::use_byte_size_t(), original.storage().nbytes(),
          c10::DataPtr(memory, c10::Device(type)), c10::GetAllocator(type), /*resizable=*/true);
      originals.emplace(storage.unsafeGetStorageImpl(), original);
      storages.emplace(key, std::move(storage));
    }

    DispatchKeySet keys(type == c10::DeviceType::CPU ? DispatchKey::CPU : DispatchKey::Meta);
    Tensor twin = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(storages.at(key)), keys, original.dtype());
    twin.unsafeGetTensorImpl()->set_sizes_and_strides(
        original.sizes(), original.strides(), original.storage_offset());
    tensors.emplace(twin.unsafeGetTensorImpl(), original);
    alive.push_back(twin);
    return twin;
  }

  // A result of the call -> a CUDA tensor: an argument itself, a view of one, or a new tensor.
  Tensor back(const Tensor& result) {
    if (!result.defined()) return result;
    auto same = tensors.find(result.unsafeGetTensorImpl());
    if (same != tensors.end()) return same->second;

    auto viewed = originals.find(result.storage().unsafeGetStorageImpl());
    if (viewed == originals.end()) {
      return at::detail::empty_strided_generic(
          result.sizes(), result.strides(), &card, DispatchKeySet(DispatchKey::CUDA),
          result.scalar_type());
    }
    Tensor view = at::detail::make_tensor<c10::TensorImpl>(
        c10::TensorImpl::VIEW, c10::Storage(viewed->second.storage()), viewed->second.key_set(),
        result.dtype());
    view.unsafeGetTensorImpl()->set_sizes_and_strides(
        result.sizes(), result.strides(), result.storage_offset());
    return view;
  }

  // The operator may have given an argument another shape (`out=`, resize_).
  void follow_resizes() {
    for (auto& [impl, original] : tensors) {
      if (impl->sizes() == original.sizes() && impl->strides() == original.strides()) continue;
      auto storage = original.storage();
      if (impl->storage().nbytes() > storage.nbytes()) {
        storage.set_data_ptr_noswap(card.allocate(impl->storage().nbytes()));
        storage.set_nbytes(impl->storage().nbytes());
      }
      original.unsafeGetTensorImpl()->set_sizes_and_strides(
          impl->sizes(), impl->strides(), impl->storage_offset());
    }
  }
};

template <typename Function>
static IValue map_tensors(const IValue& value, Function function) {
  if (value.isTensor()) return function(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorVector()) list.push_back(function(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (std::optional<Tensor> tensor : value.toOptionalTensorVector()) {
      list.push_back(tensor ? std::optional<Tensor>(function(*tensor)) : std::nullopt);
    }
    return list;
  }
  return value;
}

template <typename Values>
static std::vector<Tensor> tensors_in(const Values& values) {
  std::vector<Tensor> found;
  for (const IValue& value : values) {
    map_tensors(value, [&](const Tensor& tensor) {
      if (tensor.defined()) found.push_back(tensor);
      return tensor;
    });
  }
  return found;
}


// ---- 4. Operators -------------------------------------------------------------------------------

using Names = std::set<std::string>;

// Their results depend on numbers in such a way that a GPU must tell them to the host.
static const Names READS_NUMBERS = {
    "aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave",
    "aten::bincount"};

static const Names INDEXING = {
    "aten::index", "aten::_unsafe_index", "aten::_index_put_impl_", "aten::index_put_"};

// Meta forgives floating types that differ here, CUDA does not.
static const Names ONE_TYPE = {
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution",
    "aten::convolution_backward", "aten::native_layer_norm", "aten::native_group_norm",
    "aten::_fused_rms_norm", "aten::scatter", "aten::scatter_", "aten::scatter_add",
    "aten::lerp", "aten::lerp_", "aten::masked_scatter_", "aten::dot", "aten::mv", "aten::addmv",
    "aten::index_copy", "aten::_index_put_impl_"};

static void check(const std::string& name, const std::vector<IValue>& arguments) {
  std::set<c10::ScalarType> types;
  for (size_t k = 0; k < arguments.size(); k++) {
    bool index = INDEXING.count(name) && k == 1;
    for (const Tensor& tensor : tensors_in(std::vector<IValue>{arguments[k]})) {
      // CUDA's kernels take numbers (tensors without dimensions) from the CPU, and indices.
      bool number = tensor.dim() == 0 || tensor.numel() == 0;
      TORCH_CHECK(
          tensor.is_cuda() || index || (number && !ONE_TYPE.count(name)), name,
          ": Expected all tensors to be on the same device, but found a tensor of shape ",
          tensor.sizes(), " on the CPU beside others on cuda:0");
      if (at::isFloatingType(tensor.scalar_type())) types.insert(tensor.scalar_type());
    }
  }
  TORCH_CHECK(types.size() < 2 || !ONE_TYPE.count(name), name, ": expected one floating type");
}

// Masks among the indices -> the places where they are true, as CUDA's kernels do.
static IValue expand_masks(const IValue& indices) {
  c10::List<std::optional<Tensor>> expanded;
  for (const std::optional<Tensor>& index : indices.toOptionalTensorVector()) {
    bool mask = index && (index->scalar_type() == at::kBool || index->scalar_type() == at::kByte);
    if (index && !index->is_cuda()) tell("copy to the GPU (index)");
    if (!mask) {
      expanded.push_back(index);
      continue;
    }
    static auto nonzero = c10::Dispatcher::singleton()
        .findSchemaOrThrow("aten::nonzero", "").typed<Tensor(const Tensor&)>();
    static auto select = c10::Dispatcher::singleton()
        .findSchemaOrThrow("aten::select", "int")
        .typed<Tensor(const Tensor&, int64_t, c10::SymInt)>();
    Tensor places = nonzero.call(*index);
    for (int64_t dim = 0; dim < index->dim(); dim++) {
      expanded.push_back(select.call(places, 1, dim));
    }
  }
  return expanded;
}

static bool is_small(const Tensor& tensor) {
  return tensor.numel() <= (tensor.is_floating_point() ? 1 << 16 : 1 << 22);
}

// The operator's numbers, from the CPU, into the results that stand on the stack. False: not known.
static bool compute(const c10::OperatorHandle& op, const std::vector<IValue>& arguments,
                    const std::vector<IValue>& results) {
  if (op.hasTag(at::Tag::nondeterministic_seeded)) return false;
  for (const Tensor& tensor : tensors_in(arguments)) {
    if (!is_known(tensor) || !is_small(tensor)) return false;
  }
  for (const Tensor& tensor : tensors_in(results)) {
    if (!is_small(tensor)) return false;
  }

  StandIns cpu{c10::DeviceType::CPU};
  c10::Stack stack;
  for (const IValue& value : arguments) {
    stack.push_back(map_tensors(value, [&](const Tensor& tensor) { return cpu.of(tensor); }));
  }
  try {
    op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), &stack);
  } catch (const c10::Error&) {
    return false;        // an operator that only GPUs have
  }

  auto from = tensors_in(stack);
  auto to = tensors_in(results);
  for (size_t k = 0; k < from.size(); k++) {
    bool shared = cpu.originals.count(from[k].storage().unsafeGetStorageImpl());
    if (!shared) StandIns{c10::DeviceType::CPU}.of(to[k]).copy_(from[k]);
  }
  return true;
}

// copy_ between the host and the GPU.
static void transfer(const c10::OperatorHandle& op, const std::vector<IValue>& arguments) {
  Tensor to = arguments[0].toTensor();
  Tensor from = arguments[1].toTensor();
  const Tensor& host = to.is_cuda() ? from : to;
  bool waits = !arguments[2].toBool() || !pinned.count(host.storage().data());
  if (waits && from.numel()) tell(to.is_cuda() ? "copy to the GPU" : "copy to the host");

  bool known = is_known(from) && is_small(from) && is_small(to);
  StandIns cpu{c10::DeviceType::CPU};
  Tensor target = cpu.of(to);
  if (known) target.copy_(cpu.of(from).expand(to.sizes()));
  else if (!to.is_cuda()) target.zero_();
  set_known(to, known);
}

// What reads_numbers gives, from the CPU.
static void read_numbers(const c10::OperatorHandle& op, const std::vector<IValue>& arguments,
                         c10::Stack* stack) {
  const std::string& name = op.schema().name();
  tell(name.c_str() + strlen("aten::"));
  bool known = true;
  for (const Tensor& tensor : tensors_in(arguments)) known = known && is_known(tensor);

  // Of what is not known a number is 1, and all tensors are equal.
  if (!known && name == "aten::equal") return stack->push_back(true);
  if (!known && name == "aten::_local_scalar_dense") {
    bool floating = arguments[0].toTensor().is_floating_point();
    return stack->push_back(floating ? at::Scalar(1.0) : at::Scalar(int64_t(1)));
  }
  // Only the mask must be known to say how many are selected.
  const Tensor decides = arguments[name == "aten::masked_select" ? 1 : 0].toTensor();
  TORCH_CHECK(is_known(decides), name, ": the numbers of a tensor of shape ", decides.sizes(),
              " would be needed, and are not known");

  StandIns cpu{c10::DeviceType::CPU};
  for (const IValue& value : arguments) {
    stack->push_back(map_tensors(value, [&](const Tensor& tensor) { return cpu.of(tensor); }));
  }
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);

  for (IValue& value : *stack) {
    value = map_tensors(value, [&](const Tensor& result) {
      Tensor on_card = cpu.back(result);
      StandIns{c10::DeviceType::CPU}.of(on_card).copy_(result);
      set_known(on_card, known);
      return on_card;
    });
  }
}

// The results of a call such as add.out(a, b, out=c) whose c has its shape already. torch's own C++
// has checked it: on its way here it turned add(a, b) into this call. Otherwise nothing.
static std::vector<IValue> ready_outputs(const c10::OperatorHandle& op,
                                         const std::vector<IValue>& arguments) {
  std::vector<IValue> outputs;
  for (size_t k = 0; k < arguments.size(); k++) {
    const c10::Argument& argument = op.schema().arguments()[k];
    bool written = argument.alias_info() && argument.alias_info()->isWrite();
    if (!argument.kwarg_only() || !written) continue;
    if (!arguments[k].isTensor() || arguments[k].toTensor().numel() == 0) return {};
    outputs.push_back(arguments[k]);
  }
  return outputs;
}

static Tensor empty_like(const Tensor& tensor, c10::ScalarType type) {
  return at::detail::empty_generic(tensor.sizes(), &card, DispatchKeySet(DispatchKey::CUDA), type,
                                   tensor.suggest_memory_format());
}

static Tensor empty_float(at::IntArrayRef sizes) {
  return at::detail::empty_generic(sizes, &card, DispatchKeySet(DispatchKey::CUDA), at::kFloat, {});
}

// The results of some frequent operators that Meta composes of many others, in Python: for these
// alone a step would take twice as long. Otherwise nothing.
static std::vector<IValue> frequent_outputs(const std::string& name,
                                            const std::vector<IValue>& arguments) {
  static const Names frequent = {
      "aten::native_layer_norm", "aten::native_layer_norm_backward", "aten::_fused_rms_norm",
      "aten::_fused_rms_norm_backward", "aten::native_group_norm", "aten::native_dropout",
      "aten::native_dropout_backward"};
  if (!frequent.count(name)) return {};

  Tensor x = arguments[0].toTensor();
  Tensor result = empty_like(x, x.scalar_type());
  if (name == "aten::native_dropout") return {result, empty_like(x, at::kBool)};
  if (name == "aten::native_dropout_backward") return {result};
  if (name == "aten::native_group_norm") {
    std::vector<int64_t> groups = {arguments[3].toInt(), arguments[6].toInt()};
    return {result, empty_float(groups), empty_float(groups)};
  }

  bool backward = name.find("_backward") != std::string::npos;
  bool rms = name == "aten::_fused_rms_norm" || name == "aten::_fused_rms_norm_backward";
  if (!backward) {
    // One mean (not of the RMS norm) and one deviation for each row.
    std::vector<int64_t> rows = x.sizes().vec();
    for (size_t k = 0; k < arguments[1].toDimVector().size(); k++) rows[rows.size() - 1 - k] = 1;
    if (rms) return {result, empty_float(rows)};
    return {result, empty_float(rows), empty_float(rows)};
  }
  // Gradients of the input, the weight and (not of the RMS norm) the bias, as far as wanted.
  std::vector<Tensor> inputs = {arguments[1].toTensor(), arguments[rms ? 4 : 5].toTensor()};
  if (!rms) inputs.push_back(arguments[6].toTensor());
  auto wanted = arguments[rms ? 5 : 7].toBoolList();
  std::vector<IValue> gradients;
  for (size_t k = 0; k < inputs.size(); k++) {
    gradients.push_back(wanted[k] ? empty_like(inputs[k], inputs[k].scalar_type()) : Tensor());
  }
  return gradients;
}

// FLOPs of matrix products, convolutions and attention; a multiplication and an addition are two.
static void count_flops(const std::string& name, const std::vector<IValue>& arguments,
                        const std::vector<IValue>& results) {
  static const Names products = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"};
  auto tensor = [&](size_t k) { return arguments[k].toTensor(); };
  auto places = [](const Tensor& x) { return double(x.numel()) / x.size(1); };   // of all images

  if (products.count(name)) {
    size_t first = name.find("add") == std::string::npos ? 0 : 1;
    flops += 2.0 * tensor(first).numel() * tensor(first + 1).size(-1);
  } else if (name == "aten::convolution") {
    bool transposed = arguments[6].toBool();
    flops += 2 * places(transposed ? tensor(0) : results[0].toTensor()) * tensor(1).numel();
  } else if (name == "aten::convolution_backward") {
    bool transposed = arguments[7].toBool();
    auto wanted = arguments[10].toBoolList();
    double forward = 2 * places(tensor(transposed ? 1 : 0)) * tensor(2).numel();
    flops += forward * (int(wanted[0]) + int(wanted[1]));
  } else if (name.rfind("aten::_scaled_dot_product_", 0) == 0) {
    // Scores and their sum; the backward computes the scores again, and four gradients.
    bool backward = name.find("_backward") != std::string::npos;
    Tensor q = tensor(backward ? 1 : 0);
    double product = 2.0 * q.numel() * tensor(backward ? 2 : 1).size(-2);
    flops += (backward ? 5 : 2) * product;
  }
}

// Every operator on a CUDA tensor arrives here.
static void run(const c10::OperatorHandle& op, c10::Stack* stack) {
  const std::string& name = op.schema().name();
  const size_t count = op.schema().arguments().size();
  std::vector<IValue> arguments(stack->end() - count, stack->end());
  c10::Stack inner;
  stack->erase(stack->end() - count, stack->end());

  if (name == "aten::copy_" &&
      arguments[0].toTensor().is_cuda() != arguments[1].toTensor().is_cuda()) {
    transfer(op, arguments);
    return stack->push_back(arguments[0]);
  }
  check(name, arguments);
  if (READS_NUMBERS.count(name)) {
    read_numbers(op, arguments, &inner);
    stack->insert(stack->end(), inner.begin(), inner.end());
    return;
  }
  if (INDEXING.count(name)) arguments[1] = expand_masks(arguments[1]);

  StandIns meta{c10::DeviceType::Meta};
  std::vector<IValue> results = ready_outputs(op, arguments);
  if (results.empty()) results = frequent_outputs(name, arguments);
  if (results.empty()) {
    for (const IValue& value : arguments) {
      IValue twin = map_tensors(value, [&](const Tensor& tensor) { return meta.of(tensor); });
      if (value.isDevice()) twin = c10::Device(c10::DeviceType::Meta);
      inner.push_back(twin);
    }
    op.redispatchBoxed(DispatchKeySet(DispatchKey::Meta), &inner);
    meta.follow_resizes();
    for (const IValue& value : inner) {
      results.push_back(map_tensors(value, [&](const Tensor& made) { return meta.back(made); }));
    }
  }

  count_flops(name, arguments, results);

  // What the operator made or changed has known numbers, or not. Views share those of their base.
  bool known = compute(op, arguments, results);
  std::set<c10::StorageImpl*> given;
  for (const Tensor& tensor : tensors_in(arguments)) {
    given.insert(tensor.storage().unsafeGetStorageImpl());
  }
  for (const Tensor& made : tensors_in(results)) {
    if (!given.count(made.storage().unsafeGetStorageImpl())) set_known(made, known);
  }
  for (size_t k = 0; k < count; k++) {
    auto alias = op.schema().arguments()[k].alias_info();
    if (!alias || !alias->isWrite()) continue;
    for (const Tensor& changed : tensors_in(std::vector<IValue>{arguments[k]})) {
      set_known(changed, known);
    }
  }
  stack->insert(stack->end(), results.begin(), results.end());
}

static Tensor empty(c10::SymIntArrayRef size, std::optional<c10::ScalarType> type,
                    std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>,
                    std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &card, DispatchKeySet(DispatchKey::CUDA),
      c10::dtype_or_default(type), format);
}

static Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                            std::optional<c10::ScalarType> type, std::optional<c10::Layout>,
                            std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &card,
      DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(type));
}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", TORCH_FN(empty));
  library.impl("empty_strided", TORCH_FN(empty_strided));
  // CUDA has kernels of its own for these, other devices compose them of several operators.
  for (const char* name :
       {"copy_", "convolution", "convolution_backward", "native_layer_norm", "native_group_norm",
        "_fused_rms_norm", "_fused_rms_norm_backward"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run>());
  }
}


// ---- 5. What torch asks of a device -------------------------------------------------------------

struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return CUDA; }
  c10::Device getDevice() const override { return CUDA; }
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, CUDA);
  }
};

struct CardGenerator : c10::GeneratorImpl {
  uint64_t first = 0;
  CardGenerator() : GeneratorImpl(CUDA, DispatchKeySet(DispatchKey::CUDA)) {}
  void set_current_seed(uint64_t seed) override { first = seed; }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return first; }
  uint64_t seed() override { return first; }
  void set_state(const c10::TensorImpl&) override {}
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return {}; }
  CardGenerator* clone_impl() const override { return new CardGenerator(); }
};

struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  bool isPinnedPtr(const void* memory) const override { return pinned.count(memory); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<CardGenerator>();
  }
};

namespace at {
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", Hooks)
}

static Guard guard;

extern "C" {
void install() {
  auto place = static_cast<size_t>(c10::DeviceType::CUDA);
  c10::impl::device_guard_impl_registry[place].store(&guard);
  c10::SetAllocator(c10::DeviceType::CUDA, &card);
}
void listen(Listener function) { listener = function; }
void set_total(int64_t bytes) { total = bytes; }
int64_t used_bytes() { return used; }
int64_t peak_bytes() { return peak; }
double flops_done() { return flops; }
int64_t bytes_at_peak(int64_t line) {
  return size_t(line) < held_at_peak.size() ? held_at_peak[line] : 0;
}
void reset_peak() {
  peak = used;
  noted_peak = used;
  held_at_peak = held;
}
}
