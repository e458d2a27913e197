//! Batches of too few examples, of none, and of packed rows.

use super::*;
use crate::training::data::{fixtures::set, pack};
use proptest::prelude::*;

fn plan(iters: u64, steps_per_eval: u64, val_batches: Option<u64>, seed: u32) -> BatchPlan {
    BatchPlan { iters, steps_per_eval, val_batches, seed }
}

#[test]
fn too_few_examples_are_named_with_both_numbers() {
    let few = set(&[(5, 1), (5, 1)], 10);
    let error = Grouped::new(&few, 3).unwrap_err().to_string();
    assert!(error.starts_with("test data has 2 examples, fewer than the batch size 3"), "{error}");
    let error = Grouped::packed(&few, &pack(&few), 2).unwrap_err().to_string();
    assert!(error.starts_with("the 2 examples of test data fill 1 packed rows, fewer than the batch size 2"), "{error}");
}

#[test]
fn zeros_are_refused() {
    let one = set(&[(5, 1)], 10);
    assert_eq!(Grouped::new(&one, 0), Err(BatchError::Zero { name: "batch_size" }));
    assert_eq!(Grouped::packed(&one, &pack(&one), 0), Err(BatchError::Zero { name: "batch_size" }));
    let train = Grouped::new(&one, 1).unwrap();
    assert_eq!(Batches::new(train, None, plan(1, 0, None, 0)).unwrap_err(), BatchError::Zero { name: "steps_per_eval" });
}

#[test]
fn batches_without_anything_to_learn_are_refused_before_they_are_reached() {
    let mut train = set(&[(5, 1), (5, 1), (5, 1), (5, 1)], 10);
    let check = |train: &DataSet, batch_size: usize, iters: u64| {
        let grouped = Grouped::new(train, batch_size).unwrap();
        Batches::new(grouped, None, plan(iters, 10, None, 0)).unwrap().check_trained(train)
    };
    assert_eq!(check(&train, 1, 4), Ok(()));
    (train.examples[1].offset, train.examples[2].offset) = (9, 9);
    assert_eq!(check(&train, 2, 4), Ok(()), "each has a neighbour with targets");
    let error = check(&train, 1, 4).unwrap_err();
    assert_eq!(error, BatchError::NothingToLearn { set: "test data".to_owned(), batches: 2, example: 2, max_seq_length: 10 });
    let text = error.to_string();
    assert!(text.contains("the first of their examples is number 2 of test data") && text.contains("max_seq_length = 10"), "{text}");
    let reached = NumpyRandom::new(0).permutation(4).into_iter().take_while(|batch| !matches!(batch, 1 | 2)).count() as u64;
    assert_eq!(check(&train, 1, reached), Ok(()), "no iteration comes to them");
    assert!(check(&train, 1, reached + 1).is_err());
}

#[test]
fn an_evaluation_without_any_target_is_refused() {
    let mut valid = set(&[(5, 1), (5, 1), (5, 1)], 10);
    valid.examples[0].offset = 9;
    valid.examples[1].offset = 9;
    assert_eq!(Grouped::new(&valid, 1).unwrap().check_evaluated(&valid), Ok(()));
    let error = Grouped::new(&valid, 2).unwrap().check_evaluated(&valid).unwrap_err();
    assert_eq!(error, BatchError::NothingToEvaluate { set: "test data".to_owned(), max_seq_length: 10 });
    assert!(error.to_string().starts_with("no target of test data counts"), "{error}");
}

#[test]
fn packed_rows_go_through_batches_together() {
    let many = set(&[(6, 1), (5, 1), (4, 1), (3, 1), (10, 1), (2, 1)], 10);
    let grouped = Grouped::packed(&many, &pack(&many), 2).unwrap();
    let batches = Batches::new(grouped, None, plan(2, 10, None, 3)).unwrap();
    let seen: Vec<Vec<u32>> = batches.map(|iteration| iteration.batch).collect();
    assert_eq!(seen, [vec![0, 2, 1, 3, 5], vec![0, 2, 1, 3, 5]]);
}

proptest! {
    #[test]
    fn an_epoch_has_each_example_at_most_once(
        fields in prop::collection::vec(1usize..4, 1..80), batch_size in 1usize..6, seed: u32, evals in 1u64..5,
    ) {
        prop_assume!(fields.len() >= batch_size);
        let train = set(&fields.iter().map(|fields| (3, *fields)).collect::<Vec<_>>(), 10);
        let grouped = Grouped::new(&train, batch_size).unwrap();
        let per_epoch = grouped.len() as u64;
        let batches = Batches::new(grouped.clone(), Some(grouped), plan(2 * per_epoch, evals, None, seed)).unwrap();
        let all: Vec<_> = batches.clone().collect();
        prop_assert_eq!(all.len() as u64, 2 * per_epoch);
        let whole = |batches: Vec<Vec<u32>>| {
            let mut seen = batches.concat();
            seen.sort_unstable();
            seen.dedup();
            seen.len()
        };
        for epoch in all.chunks(per_epoch as usize) {
            prop_assert_eq!(whole(epoch.iter().map(|iteration| iteration.batch.clone()).collect()), per_epoch as usize * batch_size);
        }
        for iteration in &all {
            let due = iteration.iteration == 1 || iteration.iteration % evals == 0 || iteration.iteration == 2 * per_epoch;
            prop_assert_eq!(iteration.evaluation.is_some(), due);
            let evaluated = iteration.evaluation.clone().map_or(per_epoch as usize * batch_size, whole);
            prop_assert_eq!(evaluated, per_epoch as usize * batch_size);
        }
        let mut resumed = batches;
        resumed.go_to(per_epoch);
        prop_assert!(resumed.eq(all[per_epoch as usize..].iter().cloned()));
    }
}
