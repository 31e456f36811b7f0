//! What each part costs: cutting, counting, training, encoding, and the inputs that break others.
//!
//!     cargo bench -p rustbpe
//!     RUSTBPE_TEXT=FILE cargo bench -p rustbpe -- encode
//!
//! The text is a file of the user's, or this crate's own sources. Against peers:
//! benchmarks/tokenizer.py.

use std::hint::black_box;

use criterion::{criterion_group, criterion_main, BatchSize, Criterion, Throughput};
use rustbpe::{train, Encoder, Pair, PieceCounts, Splitter, Watch, SPLIT_PATTERN};

const SOURCES: [&str; 5] = [
    include_str!("../README.md"),
    include_str!("../src/encode.rs"),
    include_str!("../src/layout.rs"),
    include_str!("../src/pieces.rs"),
    include_str!("../src/python.rs"),
];

fn text() -> String {
    match std::env::var("RUSTBPE_TEXT") {
        Ok(path) => std::fs::read_to_string(&path).expect("RUSTBPE_TEXT names a file of UTF-8"),
        Err(_) => SOURCES.concat(),
    }
}

fn splitter() -> Splitter {
    Splitter::new(SPLIT_PATTERN).expect("the pattern is known")
}

fn count(text: &str) -> PieceCounts {
    let mut counts = PieceCounts::default();
    counts.add_text(&splitter(), text).expect("the pattern covers every text");
    counts
}

fn learn(counts: PieceCounts) -> Vec<Pair> {
    train(counts, 32768, 1, &Watch::default()).expect("nobody interrupts")
}

fn on_text(criterion: &mut Criterion) {
    let text = text();
    let merges = learn(count(&text));
    let encoder = || Encoder::from_merges(splitter(), &merges);
    let mut group = criterion.benchmark_group("text");
    group.sample_size(10).throughput(Throughput::Bytes(text.len() as u64));
    let by_hand = splitter();
    group.bench_function("split", |bencher| {
        bencher.iter(|| by_hand.for_each(&text, |start, end| _ = black_box((start, end))))
    });
    group.bench_function("count", |bencher| bencher.iter(|| count(&text)));
    group.bench_function("train", |bencher| {
        bencher.iter_batched(|| count(&text), learn, BatchSize::PerIteration)
    });
    group.bench_function("encode, first pass", |bencher| {
        bencher.iter_batched(encoder, |fresh| fresh.encode(&text), BatchSize::PerIteration)
    });
    let warm = encoder();
    group.bench_function("encode, repeated", |bencher| bencher.iter(|| warm.encode(&text)));
    let ids = warm.encode(&text).expect("the pattern covers every text");
    group.bench_function("decode", |bencher| bencher.iter(|| warm.decode(&ids)));
    group.finish();
}

/// A megabyte of one character is one piece, or a million.
fn on_a_megabyte_of_one_letter(criterion: &mut Criterion) {
    for letter in ["a", " ", "-", "7"] {
        let text = letter.repeat(1 << 20);
        let mut group = criterion.benchmark_group(format!("a megabyte of {letter:?}"));
        group.sample_size(10);
        group.bench_function("train", |bencher| bencher.iter(|| learn(count(&text))));
        let merges = learn(count(&text));
        group.bench_function("encode", |bencher| {
            bencher.iter_batched(
                || Encoder::from_merges(splitter(), &merges),
                |fresh| fresh.encode(&text),
                BatchSize::PerIteration,
            )
        });
        group.finish();
    }
}

criterion_group!(benches, on_text, on_a_megabyte_of_one_letter);
criterion_main!(benches);
