    func testSampling() throws {
        let scores: [Float] = [1, 3, 3, -.infinity]
        var likeliest = try @@NAME@@.Sampler(@@NAME@@.Sampling())
        XCTAssertEqual(try likeliest.choose(scores), 1)
        var drawn = try @@NAME@@.Sampler(@@NAME@@.Sampling(temperature: 1, topP: 0.9, seed: 1))
        let tokens = try Set((0..<200).map { _ in try drawn.choose(scores) })
        XCTAssertEqual(tokens, [1, 2])
        XCTAssertThrowsError(try likeliest.choose([.nan]))
        XCTAssertThrowsError(try @@NAME@@.Sampler(@@NAME@@.Sampling(temperature: -1)))
    }

    func testPromptsOfEveryLength() throws {
        XCTAssertEqual(try @@NAME@@.prefillSize([0], maxNewTokens: 1), @@NAME@@.prefillSizes[0])
        XCTAssertThrowsError(try @@NAME@@.prefillSize([], maxNewTokens: 1))
        XCTAssertThrowsError(try @@NAME@@.prefillSize([@@NAME@@.vocabularySize], maxNewTokens: 1))
        let long = [Int](repeating: 0, count: @@NAME@@.context)
        XCTAssertThrowsError(try @@NAME@@.prefillSize(long, maxNewTokens: 1))
        XCTAssertEqual(try @@NAME@@.prefillSize(Array(long.dropLast()), maxNewTokens: 1), @@NAME@@.prefillSizes.last)
    }
