    func testTextInPieces() throws {
        let text = "a\u{e9}\u{20ac}\u{1f600}"
        let tokens = try @@NAME@@.tokens(of: text)
        XCTAssertEqual(tokens.suffix(10), [97, 195, 169, 226, 130, 172, 240, 159, 152, 128])
        XCTAssertEqual(@@NAME@@.text(of: tokens), text)
        var stream = @@NAME@@.TextStream()
        XCTAssertEqual(tokens.map { stream.push($0) }.filter { !$0.isEmpty }, ["a", "\u{e9}", "\u{20ac}", "\u{1f600}"])
        XCTAssertEqual(stream.push(0xF0) + stream.push(0x41), "\u{fffd}A")
        XCTAssertEqual(stream.push(0xE2) + stream.finish(), "\u{fffd}")
        XCTAssertThrowsError(try @@NAME@@.tokens(of: ""))
    }
