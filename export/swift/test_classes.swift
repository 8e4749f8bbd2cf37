    func testLikeliestClasses() throws {
        var scores = [Float](repeating: 0, count: @@NAME@@.labels?.count ?? 3)
        scores[scores.count - 1] = 2
        let best = try @@NAME@@.likeliest(scores, count: 2)
        XCTAssertEqual(best.map(\.index), scores.count == 1 ? [0] : [scores.count - 1, 0])
        XCTAssertEqual(best[0].label, @@NAME@@.labels?.last)
        let others = Float(scores.count - 1) * exp(Float(-2))
        XCTAssertEqual(best[0].probability, 1 / (1 + others), accuracy: 1e-5)
        XCTAssertThrowsError(try @@NAME@@.likeliest([.nan]))
        XCTAssertThrowsError(try @@NAME@@.likeliest(scores, count: 0))
    }
