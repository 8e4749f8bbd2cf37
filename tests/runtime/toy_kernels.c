/* A custom-op library for tests: edgekit::Twice gives 2 x for float32 x that holds no negative number. */
#include <stdint.h>
#include <string.h>

#include "onnxruntime_c_api.h"

#define CHECKED(call)                     \
    do {                                  \
        OrtStatus *status_ = (call);      \
        if (status_ != NULL) return status_; \
    } while (0)

static const OrtApi *api;
static OrtCustomOp twice;

static OrtStatusPtr create(const OrtCustomOp *op, const OrtApi *ort, const OrtKernelInfo *info, void **kernel) {
    (void)ort, (void)info;
    *kernel = (void *)op;
    return NULL;
}

static OrtStatusPtr compute(void *kernel, OrtKernelContext *context) {
    (void)kernel;
    const OrtValue *x;
    OrtValue *y;
    OrtTensorTypeAndShapeInfo *info;
    int64_t shape[8];
    size_t rank, count;
    void *from, *to;
    CHECKED(api->KernelContext_GetInput(context, 0, &x));
    CHECKED(api->GetTensorTypeAndShape(x, &info));
    CHECKED(api->GetDimensionsCount(info, &rank));
    if (rank > 8) return api->CreateStatus(ORT_INVALID_ARGUMENT, "Twice: x has more than 8 axes");
    CHECKED(api->GetDimensions(info, shape, rank));
    CHECKED(api->GetTensorShapeElementCount(info, &count));
    api->ReleaseTensorTypeAndShapeInfo(info);
    CHECKED(api->KernelContext_GetOutput(context, 0, shape, rank, &y));
    CHECKED(api->GetTensorMutableData((OrtValue *)x, &from));
    CHECKED(api->GetTensorMutableData(y, &to));
    for (size_t i = 0; i < count; i++) {
        if (((float *)from)[i] < 0) return api->CreateStatus(ORT_INVALID_ARGUMENT, "Twice: 'x' must be >= 0");
        ((float *)to)[i] = 2 * ((float *)from)[i];
    }
    return NULL;
}

static void destroy(void *kernel) { (void)kernel; }
static const char *name(const OrtCustomOp *op) { (void)op; return "Twice"; }
static const char *provider(const OrtCustomOp *op) { (void)op; return "CPUExecutionProvider"; }
static size_t one_tensor(const OrtCustomOp *op) { (void)op; return 1; }
static int one(const OrtCustomOp *op) { (void)op; return 1; }
static ONNXTensorElementDataType type(const OrtCustomOp *op, size_t index) {
    (void)op, (void)index;
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}
static OrtCustomOpInputOutputCharacteristic required(const OrtCustomOp *op, size_t index) {
    (void)op, (void)index;
    return INPUT_OUTPUT_REQUIRED;
}
static OrtMemType memory(const OrtCustomOp *op, size_t index) {
    (void)op, (void)index;
    return OrtMemTypeDefault;
}

__attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base);

OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    OrtCustomOpDomain *domain;
    api = base->GetApi(ORT_API_VERSION);
    if (api == NULL) return NULL;
    memset(&twice, 0, sizeof twice);
    twice.version = ORT_API_VERSION;
    twice.CreateKernelV2 = create;
    twice.KernelComputeV2 = compute;
    twice.KernelDestroy = destroy;
    twice.GetName = name;
    twice.GetExecutionProviderType = provider;
    twice.GetInputType = twice.GetOutputType = type;
    twice.GetInputTypeCount = twice.GetOutputTypeCount = one_tensor;
    twice.GetInputCharacteristic = twice.GetOutputCharacteristic = required;
    twice.GetInputMemoryType = memory;
    twice.GetVariadicInputMinArity = twice.GetVariadicOutputMinArity = one;
    twice.GetVariadicInputHomogeneity = twice.GetVariadicOutputHomogeneity = one;
    twice.GetStartVersion = twice.GetEndVersion = one;
    CHECKED(api->CreateCustomOpDomain("edgekit", &domain));
    CHECKED(api->CustomOpDomain_Add(domain, &twice));
    return api->AddCustomOpDomain(options, domain);
}
