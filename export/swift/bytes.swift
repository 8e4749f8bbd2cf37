extension @@NAME@@ {
    /// The ids of a text: its UTF-8 bytes@@BOS_TEXT@@.
    ///
    /// - Throws: `Failure.badInput` for an empty text.
    public static func tokens(of text: String) throws -> [Int] {
        guard !text.isEmpty else { throw Failure.badInput("the prompt is empty; give the model a text to continue") }
        return @@BOS_PREFIX@@text.utf8.map { Int($0) }
    }

    /// The text of ids; those from 256 on stand for no text, and bytes that are no character become U+FFFD.
    public static func text(of tokens: [Int]) -> String {
        String(decoding: tokens.filter { $0 < 256 }.map { UInt8($0) }, as: UTF8.self)
    }

    /// Turns the ids of one answer into text as they come. Characters appear whole, when their last byte is there.
    public struct TextStream: Sendable {
        private var waiting: [UInt8] = []

        /// A stream before its first token.
        public init() {}

        /// The text that is certain after this token; often empty in the midst of a character.
        public mutating func push(_ token: Int) -> String {
            guard (0..<256).contains(token) else { return "" }
            waiting.append(UInt8(token))
            let kept = Self.unfinished(waiting)
            let text = String(decoding: waiting.dropLast(kept), as: UTF8.self)
            waiting = Array(waiting.suffix(kept))
            return text
        }

        /// The rest, when no token follows: bytes that are no character become U+FFFD.
        public mutating func finish() -> String {
            defer { waiting = [] }
            return String(decoding: waiting, as: UTF8.self)
        }

        /// How many bytes at the end may be the beginning of a character (Unicode 15, table 3-7).
        private static func unfinished(_ bytes: [UInt8]) -> Int {
            for count in stride(from: min(3, bytes.count), through: 1, by: -1) {
                let end = Array(bytes.suffix(count))
                let wanted: Int
                switch end[0] {
                case 0xC2...0xDF: wanted = 2
                case 0xE0...0xEF: wanted = 3
                case 0xF0...0xF4: wanted = 4
                default: continue
                }
                guard count < wanted, end.dropFirst().allSatisfy({ (0x80...0xBF).contains($0) }) else { continue }
                if count > 1 {
                    switch (end[0], end[1]) {
                    case (0xE0, 0x80...0x9F), (0xED, 0xA0...0xBF), (0xF0, 0x80...0x8F), (0xF4, 0x90...0xBF): continue
                    default: break
                    }
                }
                return count
            }
            return 0
        }
    }
}
