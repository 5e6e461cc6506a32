//! A trained model from picture files to words, on every engine: PyTorch's own answers.

use std::fs;

use flamingo_runtime::{GenerateOptions, Model, PromptFile, Segment};
use flamingo_tests::{compiled, opening, tiny_scenes};
use serde_json::Value;

/// Answers may differ where PyTorch's two best logits were closer than this.
const NEAR_TIE: f64 = 0.01;

/// Answers all bundled prompts.
fn check(backend: &str) {
    let (_scratch, artifact) = compiled(&tiny_scenes());
    let model = Model::open(&artifact, &opening(backend)).unwrap();
    let text = fs::read_to_string(tiny_scenes().join("prompts.jsonl")).unwrap();
    let (mut n, mut near_ties) = (0, 0);
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let segments: Vec<Segment> = serde_json::from_value(line["segments"].clone()).unwrap();
        let mut prompt = PromptFile { segments, ..PromptFile::default() };
        prompt.resolve(&tiny_scenes());
        let expected_ids: Vec<u32> = serde_json::from_value(line["tokens"].clone()).unwrap();
        assert_eq!(model.encode_prompt(&prompt).unwrap(), expected_ids, "{}", line["prompt"]);
        let max_new_tokens = if line["task"] == "caption" { 8 } else { 1 };
        let options = GenerateOptions { max_new_tokens, ..GenerateOptions::default() };
        let answer = model.generate(&prompt, &options, &mut |_| {}).unwrap();
        n += 1;
        if answer.text != line["reference_prediction"].as_str().unwrap() {
            let margin = line["reference_margin"].as_f64().unwrap();
            assert!(margin < NEAR_TIE, "{backend}: {line}: got {:?}", answer.text);
            near_ties += 1;
        }
    }
    assert_eq!(n, 736, "bundled prompts are missing");
    assert!(near_ties * 50 <= n, "{backend}: {near_ties} near-ties of {n} differ");
}

#[test]
fn native_answers_as_pytorch() {
    check("native");
}

#[test]
fn onnx_runtime_answers_as_pytorch() {
    check("ort");
}

#[test]
fn tract_answers_as_pytorch() {
    check("tract");
}
