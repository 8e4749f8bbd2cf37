extension @@NAME@@ {
    /// The model that travels with this package: compiled where Xcode compiled it, else as it was exported.
    static func packagedModel() throws -> URL {
        #if SWIFT_PACKAGE
        let bundle = Bundle.module
        #else
        let bundle = Bundle.main  // this file was put into an app by itself, and the model beside it
        #endif
        for kind in ["mlmodelc", "mlpackage"] {
            if let url = bundle.url(forResource: "model", withExtension: kind) { return url }
        }
        throw Failure.missingModel("there is no model.mlpackage in \(bundle.bundlePath); add it, or name its place in load")
    }
}

#if canImport(CoreML)
extension @@NAME@@ {
    /// A model on its way to the actor that will use it; nobody else has it.
    private struct Loaded: @unchecked Sendable {
        let model: MLModel
    }

    /// Loads a function of a model. What must be compiled first is kept in the caches folder for the next time.
    private static func loadFunction(
        _ function: String?, from url: URL?, computeUnits: MLComputeUnits
    ) async throws -> Loaded {
        let given = try url ?? packagedModel()
        guard FileManager.default.fileExists(atPath: given.path) else {
            throw Failure.missingModel("there is no model at \(given.path)")
        }
        let configuration = MLModelConfiguration()
        configuration.computeUnits = computeUnits
        @@FUNCTION_NAME@@
        do {
            if given.pathExtension == "mlmodelc" {
                return Loaded(model: try await MLModel.load(contentsOf: given, configuration: configuration))
            }
            let kept = try url == nil ? cachedModel() : nil
            if let kept, FileManager.default.fileExists(atPath: kept.path) {
                if let model = try? await MLModel.load(contentsOf: kept, configuration: configuration) {
                    return Loaded(model: model)
                }
                try? FileManager.default.removeItem(at: kept)  // the system cleared a part of it
            }
            var compiled = try await MLModel.compileModel(at: given)
            if let kept, (try? FileManager.default.moveItem(at: compiled, to: kept)) != nil { compiled = kept }
            return Loaded(model: try await MLModel.load(contentsOf: compiled, configuration: configuration))
        } catch {
            throw Failure.unusableModel("Core ML cannot load \(given.lastPathComponent): \(error.localizedDescription)")
        }
    }

    /// Where this model is kept compiled, for this version of the system.
    private static func cachedModel() throws -> URL {
        let system = ProcessInfo.processInfo.operatingSystemVersion
        let version = "\(system.majorVersion).\(system.minorVersion).\(system.patchVersion)"
        let caches = try FileManager.default.url(
            for: .cachesDirectory, in: .userDomainMask, appropriateFor: nil, create: true)
        return caches.appendingPathComponent("@@NAME@@-@@MODEL_KEY@@-\(version).mlmodelc")
    }

    /// An output as numbers, whatever type Core ML gives them.
    private static func tensor<Scalar: MLShapedArrayScalar & Equatable & Sendable>(
        _ name: String, of answer: MLFeatureProvider, as kind: Scalar.Type
    ) throws -> Tensor<Scalar> {
        guard let array = answer.featureValue(for: name)?.multiArrayValue else {
            let given = answer.featureNames.sorted().joined(separator: ", ")
            throw Failure.badOutput("the model gave no array \(name), but \(given); export it again")
        }
        let numbers = MLShapedArray<Scalar>(converting: array)
        return try Tensor(shape: numbers.shape, values: numbers.scalars)
    }

    /// Numbers as an input of the model.
    private static func feature<Scalar: MLShapedArrayScalar>(_ tensor: Tensor<Scalar>) -> MLFeatureValue {
        MLFeatureValue(multiArray: MLMultiArray(MLShapedArray(scalars: tensor.values, shape: tensor.shape)))
    }
}
#endif
