#if canImport(CoreML)
/// @@ORIGIN@@ on Core ML. It is an actor: predictions run one after the other, away from the main thread.
public actor @@NAME@@ {
    private let model: MLModel

    private init(model: MLModel) {
        self.model = model
    }

    /// Loads the model.
    ///
    /// - Parameters:
    ///   - url: a `model.mlmodelc` or `model.mlpackage`; by default the one that travels with this package.
    ///   - computeUnits: where Core ML may run it; by default it chooses.
    /// - Throws: `Failure.missingModel` or `Failure.unusableModel`.
    public static func load(
        contentsOf url: URL? = nil, computeUnits: MLComputeUnits = .all
    ) async throws -> @@NAME@@ {
        @@NAME@@(model: try await loadFunction(nil, from: url, computeUnits: computeUnits).model)
    }

    @@METHODS@@

    /// Runs the model on inputs by their names in the manifest; `image` holds levels of the model's size.
    func run(_ inputs: [String: Input]) throws -> [String: Tensor<Float>] {
        let answer = try self.answer(to: inputs)
        var outputs: [String: Tensor<Float>] = [:]
        for name in @@OUTPUT_NAMES@@ { outputs[name] = try Self.tensor(name, of: answer, as: Float.self) }
        return outputs
    }

    private func answer(to inputs: [String: Input]) throws -> MLFeatureProvider {
        let features = @@TRY@@inputs.mapValues { input -> MLFeatureValue in
            switch input {
            case .floats(let tensor): return Self.feature(tensor)
            case .integers(let tensor): return Self.feature(tensor)
            @@IMAGE_CASE@@
            }
        }
        do {
            return try model.prediction(from: MLDictionaryFeatureProvider(dictionary: features))
        } catch {
            throw Failure.unusableModel("Core ML cannot run the model: \(error.localizedDescription)")
        }
    }

    /// An input of the model, by kind.
    enum Input: Sendable {
        case floats(Tensor<Float>)
        case integers(Tensor<Int32>)
        @@IMAGE_KIND@@
    }
}
#else
/// Without Core ML there is only the arithmetic around the model.
public enum @@NAME@@ {}
#endif

extension @@NAME@@ {
    /// What the model answers.
    public struct Outputs: Equatable, Sendable {
        @@OUTPUT_FIELDS@@
    }
}
