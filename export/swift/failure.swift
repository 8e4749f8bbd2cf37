extension @@NAME@@ {
    /// What can go wrong. `message`, and `localizedDescription`, say it for people.
    public enum Failure: LocalizedError, Equatable, Sendable {
        /// The model's file is not where it was looked for.
        case missingModel(String)
        /// Core ML cannot load the model, or run it.
        case unusableModel(String)
        /// An input does not fit the model.
        case badInput(String)
        /// An image cannot be read.
        case badImage(String)
        /// The model's answer is not what its manifest promises.
        case badOutput(String)

        /// What was expected, what came, and what to do.
        public var message: String {
            switch self {
            case .missingModel(let text), .unusableModel(let text), .badInput(let text), .badImage(let text),
                .badOutput(let text):
                return text
            }
        }

        /// The same as `message`.
        public var errorDescription: String? { message }
    }
}
