    /// Continues a text, to the end.
    ///
    /// - Returns: what follows the prompt.
    public func generate(
        _ prompt: String, maxNewTokens: Int = 64, sampling: Sampling = Sampling()
    ) async throws -> String {
        let tokens = try await generate(tokens: Self.tokens(of: prompt), maxNewTokens: maxNewTokens, sampling: sampling)
        return Self.text(of: tokens.filter { !Self.endTokens.contains($0) })
    }

    /// Continues a text, piece by piece: `for try await piece in model.stream("A list is") { print(piece) }`. Generation
    /// stops when nobody listens any more.
    public nonisolated func stream(
        _ prompt: String, maxNewTokens: Int = 64, sampling: Sampling = Sampling()
    ) -> AsyncThrowingStream<String, Error> {
        AsyncThrowingStream { continuation in
            let task = Task {
                let pieces = Pieces()
                do {
                    let tokens = try Self.tokens(of: prompt)
                    _ = try await self.generate(tokens: tokens, maxNewTokens: maxNewTokens, sampling: sampling) { token in
                        let text = Self.endTokens.contains(token) ? "" : pieces.push(token)
                        if !text.isEmpty { continuation.yield(text) }
                    }
                    let rest = pieces.finish()
                    if !rest.isEmpty { continuation.yield(rest) }
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
            continuation.onTermination = { _ in task.cancel() }
        }
    }

    /// A text in the making: tokens come one after the other, though not always on one thread.
    private final class Pieces: @unchecked Sendable {
        private let lock = NSLock()
        private var stream = TextStream()

        func push(_ token: Int) -> String { lock.withLock { stream.push(token) } }

        func finish() -> String { lock.withLock { stream.finish() } }
    }
