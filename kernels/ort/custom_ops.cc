// edgekit's custom ops for onnxruntime: registration, attributes, tensors in and out, and onnxruntime's own threads.
//
// Everything about the ops themselves (checks, choice of kernel) is behind edgekit_kernels.h. onnxruntime loads this library
// through SessionOptions.register_custom_ops_library; no C++ exception leaves it.
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#define ORT_API_MANUAL_INIT
#include "onnxruntime_cxx_api.h"
#undef ORT_API_MANUAL_INIT

#include "edgekit_kernels.h"

namespace {

constexpr size_t kErrorSize = 1024;

// A code and message of edgekit_kernels.h as a status of onnxruntime; nullptr for EDGEKIT_OK.
OrtStatusPtr StatusFrom(int code, const char* message) noexcept {
  switch (code) {
    case EDGEKIT_OK: return nullptr;
    case EDGEKIT_INVALID: return Ort::GetApi().CreateStatus(ORT_INVALID_ARGUMENT, message);
    case EDGEKIT_UNSUPPORTED: return Ort::GetApi().CreateStatus(ORT_NOT_IMPLEMENTED, message);
    case EDGEKIT_OUT_OF_MEMORY: return Ort::GetApi().CreateStatus(ORT_FAIL, message);
    default: return Ort::GetApi().CreateStatus(ORT_RUNTIME_EXCEPTION, message);
  }
}

// Runs `body` (which returns an OrtStatusPtr) and turns whatever it throws into a status.
template <typename Body>
OrtStatusPtr Guarded(const char* op, Body&& body) noexcept {
  try {
    return body();
  } catch (const Ort::Exception& error) {
    return Ort::GetApi().CreateStatus(error.GetOrtErrorCode(), error.what());
  } catch (const std::invalid_argument& error) {
    return Ort::GetApi().CreateStatus(ORT_INVALID_ARGUMENT, error.what());
  } catch (const std::exception& error) {
    return Ort::GetApi().CreateStatus(ORT_RUNTIME_EXCEPTION, error.what());
  } catch (...) {
    return Ort::GetApi().CreateStatus(ORT_RUNTIME_EXCEPTION, op);
  }
}

// ---- attributes ----

// Reads a node's attributes. An absent one gives the default; one of another kind is an error that names it.
class Attributes {
 public:
  Attributes(const char* op, const OrtKernelInfo* info) : op_(op), info_(info) {}

  int64_t Int(const char* name, int64_t otherwise) const {
    int64_t value = 0;
    if (Ok(Ort::GetApi().KernelInfoGetAttribute_int64(info_, name, &value))) return value;
    RefuseAnyKind(name, "an integer");
    return otherwise;
  }

  float Float(const char* name, float otherwise) const {
    float value = 0;
    if (Ok(Ort::GetApi().KernelInfoGetAttribute_float(info_, name, &value))) return value;
    RefuseAnyKind(name, "a float");
    return otherwise;
  }

  float RequiredFloat(const char* name) const {
    float value = 0;
    if (Ok(Ort::GetApi().KernelInfoGetAttribute_float(info_, name, &value))) return value;
    RefuseAnyKind(name, "a float");
    throw std::invalid_argument(std::string(op_) + " takes a float attribute " + name + "; the node has none");
  }

  std::string String(const char* name, const char* otherwise) const {
    size_t size = 0;
    if (Ok(Ort::GetApi().KernelInfoGetAttribute_string(info_, name, nullptr, &size)) && size > 0) {
      std::string value(size, '\0');
      if (Ok(Ort::GetApi().KernelInfoGetAttribute_string(info_, name, value.data(), &size))) {
        value.resize(size - 1);  // the terminating zero
        return value;
      }
    }
    RefuseAnyKind(name, "a string");
    return otherwise;
  }

 private:
  static bool Ok(OrtStatus* raw) { return Ort::Status(raw).IsOK(); }

  // Throws when the node has `name` in any kind: called after its right kind was not found.
  void RefuseAnyKind(const char* name, const char* wanted) const {
    const OrtApi& api = Ort::GetApi();
    int64_t integer = 0;
    float real = 0;
    size_t size = 0;
    const char* kind = nullptr;
    if (Ok(api.KernelInfoGetAttribute_int64(info_, name, &integer))) {
      kind = "an integer";
    } else if (Ok(api.KernelInfoGetAttribute_float(info_, name, &real))) {
      kind = "a float";
    } else if (size = 0; Ok(api.KernelInfoGetAttribute_string(info_, name, nullptr, &size))) {
      kind = "a string";
    } else if (size = 0; Ok(api.KernelInfoGetAttributeArray_int64(info_, name, nullptr, &size))) {
      kind = "integers";
    } else if (size = 0; Ok(api.KernelInfoGetAttributeArray_float(info_, name, nullptr, &size))) {
      kind = "floats";
    }
    if (kind != nullptr)
      throw std::invalid_argument(std::string(op_) + " takes " + wanted + " as attribute " + name + "; the node has " + kind);
  }

  const char* op_;
  const OrtKernelInfo* info_;
};

// ---- tensors and threads of one run ----

int DtypeOf(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return EDGEKIT_FLOAT32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return EDGEKIT_FLOAT16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32: return EDGEKIT_INT32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE: return EDGEKIT_FLOAT64;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return EDGEKIT_BFLOAT16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: return EDGEKIT_INT64;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL: return EDGEKIT_BOOL;
    default: return EDGEKIT_OTHER;
  }
}

// One run of a node: its inputs as edgekit_tensor, its output, its threads.
class Run {
 public:
  explicit Run(OrtKernelContext* context) : raw_(context), context_(context), count_(context_.GetInputCount()) {
    shapes_.resize(count_);
    tensors_.resize(count_);
    for (size_t i = 0; i < count_; i++) {
      Ort::ConstValue value = context_.GetInput(i);
      if (value == nullptr) continue;
      const auto info = value.GetTensorTypeAndShapeInfo();
      shapes_[i] = info.GetShape();
      tensors_[i] = {value.GetTensorRawData(), DtypeOf(info.GetElementType()), static_cast<int>(shapes_[i].size()),
                     shapes_[i].data()};
    }
  }

  // Input `i`, or nullptr where an optional one is absent.
  const edgekit_tensor* Input(size_t i) const { return i < count_ && Present(i) ? &tensors_[i] : nullptr; }

  void* Output(const std::vector<int64_t>& shape) { return context_.GetOutput(0, shape).GetTensorMutableRawData(); }

  // onnxruntime's own pool. It does not tell how many threads it has; the kernels' parts are cut for the machine's.
  edgekit_threads Threads() {
    static const int count = static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 1U, 256U));
    return {&Run::ParallelFor, this, count};
  }

 private:
  bool Present(size_t i) const { return context_.GetInput(i) != nullptr; }

  struct Task {
    void (*run)(void*, int64_t);
    void* data;
  };

  // Not through Ort::KernelContext, which throws: between here and Guarded lie a kernel's frames and its scratch memory. When
  // onnxruntime fails, the tasks that did not run are counted and become the call's error.
  static void ParallelFor(void* self, void (*run)(void*, int64_t), void* data, int64_t count) noexcept {
    Task task{run, data};
    const auto call = [](void* task_data, size_t i) noexcept {
      const Task* each = static_cast<const Task*>(task_data);
      each->run(each->data, static_cast<int64_t>(i));
    };
    // A batch count of 0 lets idle threads take the next part.
    OrtStatusPtr status = Ort::GetApi().KernelContext_ParallelFor(static_cast<const Run*>(self)->raw_, call,
                                                                  static_cast<size_t>(count), 0, &task);
    if (status != nullptr) Ort::GetApi().ReleaseStatus(status);
  }

  const OrtKernelContext* raw_;
  Ort::KernelContext context_;
  size_t count_;
  std::vector<std::vector<int64_t>> shapes_;
  std::vector<edgekit_tensor> tensors_;
};

// ---- the ops: attributes at load time, one call per run ----

struct BlockSparseAttention {
  static constexpr const char* kName = "BlockSparseAttention";
  static constexpr size_t kInputs = 4;
  static constexpr size_t kRequired = 4;
  static constexpr size_t kIndexInput = 3;

  edgekit_bsa_args args{};

  int Read(const Attributes& node, char* error, size_t size) {
    args.block_q = node.Int("block_q", 64);
    args.block_k = node.Int("block_k", 64);
    args.causal = node.Int("causal", 1);
    args.window = node.Int("window", 0);
    args.scale = node.RequiredFloat("scale");
    args.softcap = node.Float("softcap", 0.0F);
    return edgekit_bsa_attributes(&args, error, size);
  }

  int Compute(Run& run, char* error, size_t size) const {
    edgekit_bsa_args call = args;
    int code = edgekit_bsa_shapes(run.Input(0), run.Input(1), run.Input(2), run.Input(3), &call, error, size);
    if (code != EDGEKIT_OK) return code;
    call.out = run.Output({call.batch, call.q_heads, call.q_length, call.head_dim});
    const edgekit_threads threads = run.Threads();
    return edgekit_block_sparse_attention(&call, &threads, error, size);
  }
};

struct KernelLinearAttention {
  static constexpr const char* kName = "KernelLinearAttention";
  static constexpr size_t kInputs = 3;
  static constexpr size_t kRequired = 3;
  static constexpr size_t kIndexInput = SIZE_MAX;

  edgekit_kla_args args{};

  int Read(const Attributes& node, char* error, size_t size) {
    const std::string feature_map = node.String("feature_map", "relu");
    args.feature_map = edgekit_feature_map(feature_map.c_str());
    args.eps = node.Float("eps", 1e-6F);
    if (args.feature_map < 0)
      throw std::invalid_argument("unknown feature map '" + feature_map + "'; known: elu1, identity, relu");
    return edgekit_kla_attributes(&args, error, size);
  }

  int Compute(Run& run, char* error, size_t size) const {
    edgekit_kla_args call = args;
    int code = edgekit_kla_shapes(run.Input(0), run.Input(1), run.Input(2), &call, error, size);
    if (code != EDGEKIT_OK) return code;
    call.out = run.Output({call.batch, call.heads, call.length, call.value_dim});
    const edgekit_threads threads = run.Threads();
    return edgekit_kernel_linear_attention(&call, &threads, error, size);
  }
};

struct SelectiveScan {
  static constexpr const char* kName = "SelectiveScan";
  static constexpr size_t kInputs = 7;
  static constexpr size_t kRequired = 6;
  static constexpr size_t kIndexInput = SIZE_MAX;

  edgekit_scan_args args{};

  int Read(const Attributes& node, char* error, size_t size) {
    args.delta_softplus = node.Int("delta_softplus", 0);
    return edgekit_scan_attributes(&args, error, size);
  }

  int Compute(Run& run, char* error, size_t size) const {
    edgekit_scan_args call = args;
    int code = edgekit_scan_shapes(run.Input(0), run.Input(1), run.Input(2), run.Input(3), run.Input(4), run.Input(5),
                                   run.Input(6), &call, error, size);
    if (code != EDGEKIT_OK) return code;
    call.out = run.Output({call.batch, call.channels, call.length});
    const edgekit_threads threads = run.Threads();
    return edgekit_selective_scan(&call, &threads, error, size);
  }
};

// ---- onnxruntime's side of an op ----

template <typename Op>
struct Kernel {
  Op op;

  OrtStatusPtr ComputeV2(OrtKernelContext* context) const noexcept {
    return Guarded(Op::kName, [&] {
      char error[kErrorSize] = "";
      Run run(context);
      return StatusFrom(op.Compute(run, error, sizeof error), error);
    });
  }
};

// Sets the output's shape, and its type to that of input 0: onnxruntime calls the function of one of an op's dtypes for all of
// them. Not ShapeInferContext::SetOutputShape: the -2 that headers of 1.21 write for a named dimension is
// refused by later versions, which want -1.
OrtStatusPtr SetOutputShape(OrtShapeInferContext* context, const Ort::ShapeInferContext::Shape& shape) {
  const OrtApi& api = Ort::GetApi();
  std::vector<int64_t> sizes;
  std::vector<const char*> names;
  for (const auto& dim : shape) {
    sizes.push_back(dim.IsInt() ? dim.AsInt() : -1);
    names.push_back(dim.IsInt() ? "" : dim.AsSym());
  }
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  OrtTensorTypeAndShapeInfo* first = nullptr;  // belongs to the context
  OrtTensorTypeAndShapeInfo* info = nullptr;
  OrtStatusPtr status = api.ShapeInferContext_GetInputTypeShape(context, 0, &first);
  if (status == nullptr) status = api.GetTensorElementType(first, &type);
  if (status == nullptr) status = api.CreateTensorTypeAndShapeInfo(&info);
  if (status == nullptr) status = api.SetTensorElementType(info, type);
  if (status == nullptr) status = api.SetDimensions(info, sizes.data(), sizes.size());
  if (status == nullptr) status = api.SetSymbolicDimensions(info, names.data(), names.size());
  if (status == nullptr) status = api.ShapeInferContext_SetOutputTypeShape(context, 0, info);
  if (info != nullptr) api.ReleaseTensorTypeAndShapeInfo(info);
  return status;
}

// The output's shape from the inputs' before any run: that of the first input, with the last axis of v where v has its own.
template <typename Op>
OrtStatusPtr InferShape(OrtShapeInferContext* raw) {
  const Ort::ShapeInferContext context(&Ort::GetApi(), raw);
  if (context.GetInputCount() < Op::kRequired) return nullptr;
  Ort::ShapeInferContext::Shape shape = context.GetInputShape(0);
  if constexpr (std::is_same_v<Op, KernelLinearAttention>) {
    const auto& value = context.GetInputShape(2);
    if (shape.size() != 4 || value.size() != 4) return nullptr;
    shape[3] = value[3];
  }
  return shape.empty() ? nullptr : SetOutputShape(raw, shape);
}

template <typename Op, ONNXTensorElementDataType kType>
struct CustomOp : Ort::CustomOpBase<CustomOp<Op, kType>, Kernel<Op>, true> {
  CustomOp() {
    // Not through the base class, whose wrapper would let exceptions out.
    OrtCustomOp::InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* raw) -> OrtStatusPtr {
      return Guarded(Op::kName, [&] { return InferShape<Op>(raw); });
    };
  }

  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const noexcept {
    return Guarded(Op::kName, [&]() -> OrtStatusPtr {
      char error[kErrorSize] = "";
      auto created = std::make_unique<Kernel<Op>>();
      const int code = created->op.Read(Attributes(Op::kName, info), error, sizeof error);
      if (code == EDGEKIT_OK) *kernel = created.release();
      return StatusFrom(code, error);
    });
  }

  const char* GetName() const { return Op::kName; }
  const char* GetExecutionProviderType() const { return "CPUExecutionProvider"; }
  size_t GetInputTypeCount() const { return Op::kInputs; }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetInputType(size_t i) const {
    return i == Op::kIndexInput ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 : kType;
  }
  ONNXTensorElementDataType GetOutputType(size_t) const { return kType; }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t i) const {
    return i < Op::kRequired ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  }
};

// The domain with all ops, made once per load of this library and then shared by every session. Not destroyed: sessions may
// outlive the library's static objects at exit.
OrtCustomOpDomain* Domain() {
  static OrtCustomOpDomain* const domain = [] {
    static const CustomOp<BlockSparseAttention, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT> bsa_f32;
    static const CustomOp<BlockSparseAttention, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16> bsa_f16;
    static const CustomOp<KernelLinearAttention, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT> kla_f32;
    static const CustomOp<KernelLinearAttention, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16> kla_f16;
    static const CustomOp<SelectiveScan, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT> scan_f32;
    static const CustomOp<SelectiveScan, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16> scan_f16;
    Ort::CustomOpDomain made("edgekit");
    const std::initializer_list<const OrtCustomOp*> ops = {&bsa_f32, &bsa_f16, &kla_f32, &kla_f16, &scan_f32, &scan_f16};
    for (const OrtCustomOp* op : ops) made.Add(op);
    return made.release();
  }();
  return domain;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                                                            const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr) {
    const std::string message = std::string("edgekit's kernels need onnxruntime 1.") + std::to_string(ORT_API_VERSION) +
                                " or newer; this is " + base->GetVersionString();
    return base->GetApi(1)->CreateStatus(ORT_FAIL, message.c_str());
  }
  Ort::InitApi(api);
  return Guarded("edgekit", [&] { return api->AddCustomOpDomain(options, Domain()); });
}
