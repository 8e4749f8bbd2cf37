#if canImport(CoreML)
/// @@ORIGIN@@ on Core ML. It is an actor: texts are generated away from the main thread, each with a state of its own.
public actor @@NAME@@ {
    private let url: URL?
    private let computeUnits: MLComputeUnits
    private var functions: [String: MLModel] = [:]

    private init(url: URL?, computeUnits: MLComputeUnits) {
        self.url = url
        self.computeUnits = computeUnits
    }

    /// Loads the model. The functions that read prompts are loaded when a prompt of their length comes.
    ///
    /// - Parameters:
    ///   - url: a `model.mlmodelc` or `model.mlpackage`; by default the one that travels with this package.
    ///   - computeUnits: where Core ML may run it; by default it chooses.
    /// - Throws: `Failure.missingModel` or `Failure.unusableModel`.
    public static func load(
        contentsOf url: URL? = nil, computeUnits: MLComputeUnits = .all
    ) async throws -> @@NAME@@ {
        let model = @@NAME@@(url: url, computeUnits: computeUnits)
        try await model.prepare(Self.decodeFunction)
        return model
    }

    @@TEXT_METHODS@@

    /// Continues a prompt of token ids.
    ///
    /// - Parameters:
    ///   - prompt: at least one id.
    ///   - maxNewTokens: how many tokens follow at most.
    ///   - sampling: how they are chosen; by default the likeliest.
    ///   - onToken: called with each new token, as soon as it is there.
    /// - Returns: the new tokens, with the one that ended the text.
    /// - Throws: `Failure.badInput` for an id that the model does not know, or more tokens than its context;
    ///   `CancellationError` when the task is cancelled.
    public func generate(
        tokens prompt: [Int], maxNewTokens: Int = 64, sampling: Sampling = Sampling(),
        onToken: @Sendable (Int) -> Void = { _ in }
    ) async throws -> [Int] {
        guard maxNewTokens >= 1 else { throw Failure.badInput("maxNewTokens must be at least 1, got \(maxNewTokens)") }
        let size = try Self.prefillSize(prompt, maxNewTokens: maxNewTokens)
        var sampler = try Sampler(sampling)
        let prefill = "\(Self.prefillPrefix)\(size)"
        try await prepare(prefill)
        try await prepare(Self.decodeFunction)
        let state = try function(prefill).makeState()
        let padded = prompt + [Int](repeating: Self.padToken, count: size - prompt.count)
        var scores = try run(
            prefill, [@@PREFILL_IDS@@: ([1, size], padded), @@PREFILL_LENGTH@@: ([1], [prompt.count])], state)
        var answer: [Int] = []
        while true {
            try Task.checkCancellation()
            let token = try sampler.choose(scores)
            answer.append(token)
            onToken(token)
            if Self.endTokens.contains(token) || answer.count == maxNewTokens { return answer }
            let position = prompt.count + answer.count - 1
            let inputs: [String: (shape: [Int], values: [Int])] = [
                @@DECODE_IDS@@: ([1, 1], [token]), @@DECODE_POSITION@@: ([1], [position]),
            ]
            scores = try run(Self.decodeFunction, inputs, state)
            await Task.yield()  // other texts get their turn
        }
    }

    /// Loads a function unless it is there.
    private func prepare(_ name: String) async throws {
        if functions[name] == nil {
            let loaded = try await Self.loadFunction(name, from: url, computeUnits: computeUnits)
            functions[name] = loaded.model
        }
    }

    private func function(_ name: String) throws -> MLModel {
        guard let model = functions[name] else { throw Failure.unusableModel("the function \(name) was not loaded") }
        return model
    }

    /// The scores of the next token after one run of a function, which changes the state.
    private func run(
        _ name: String, _ inputs: [String: (shape: [Int], values: [Int])], _ state: MLState
    ) throws -> [Float] {
        let features = try inputs.mapValues { input -> MLFeatureValue in
            Self.feature(try Tensor(shape: input.shape, values: input.values.map { Int32($0) }))
        }
        return try run(name, features, state)
    }

    private func run(_ name: String, _ inputs: [String: MLFeatureValue], _ state: MLState) throws -> [Float] {
        let answer: MLFeatureProvider
        do {
            let features = try MLDictionaryFeatureProvider(dictionary: inputs)
            answer = try function(name).prediction(from: features, using: state)
        } catch {
            throw Failure.unusableModel("Core ML cannot run \(name): \(error.localizedDescription)")
        }
        return try Self.tensor(@@SCORES_TEXT@@, of: answer, as: Float.self).values
    }

    /// One run of a function on a new state with these values in its first slots, for the tests.
    func scores(
        of name: String, inputs: [String: Tensor<Int32>], states: [String: Tensor<Float>]
    ) async throws -> [Float] {
        try await prepare(name)
        let state = try function(name).makeState()
        for (place, tensor) in states {
            state.withMultiArray(for: place) { array in
                for (index, value) in tensor.values.enumerated() {
                    array[Self.place(index, in: tensor.shape)] = NSNumber(value: value)
                }
            }
        }
        return try run(name, inputs.mapValues { Self.feature($0) }, state)
    }

    /// Where along each axis the number at `index` lies; the last axis runs fastest.
    private static func place(_ index: Int, in shape: [Int]) -> [NSNumber] {
        var left = index
        var place: [NSNumber] = []
        for size in shape.reversed() {
            place.append(NSNumber(value: left % size))
            left /= size
        }
        return place.reversed()
    }
}
#else
/// Without Core ML there is only the arithmetic around the model.
public enum @@NAME@@ {}
#endif

extension @@NAME@@ {
    /// How many tokens one text may have, prompt and answer together.
    public static let context = @@CONTEXT@@
    /// How many ids the model knows, from 0.
    public static let vocabularySize = @@VOCABULARY@@
    /// The ids that end a text.
    public static let endTokens: Set<Int> = @@END_TOKENS@@
    static let padToken = @@PAD_TOKEN@@
    static let decodeFunction = @@DECODE_TEXT@@
    static let prefillPrefix = @@PREFILL_TEXT@@
    static let prefillSizes = @@PREFILL_SIZES@@

    /// How many tokens the smallest function reads that has room for the prompt.
    static func prefillSize(_ prompt: [Int], maxNewTokens: Int) throws -> Int {
        guard !prompt.isEmpty else { throw Failure.badInput("the prompt has no tokens; give the model a text to continue") }
        if let unknown = prompt.first(where: { !(0..<vocabularySize).contains($0) }) {
            throw Failure.badInput("the prompt holds the token \(unknown); the model knows 0 to \(vocabularySize - 1)")
        }
        guard prompt.count <= context - maxNewTokens, let size = prefillSizes.first(where: { $0 >= prompt.count }) else {
            throw Failure.badInput(
                "\(prompt.count) tokens of the prompt and \(maxNewTokens) new ones are more than the context of \(context); "
                    + "shorten the prompt or ask for fewer")
        }
        return size
    }
}
