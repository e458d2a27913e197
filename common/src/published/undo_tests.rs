//! Random recipes made to give a new value, in the same arithmetic as the tests of selections: it wraps, so every factor has an inverse.

use super::super::select::tests::{Random, Values, evaluated_of, moved, source};
use super::*;
use std::collections::BTreeMap;

/// The number that undoes a multiplication by an odd number, modulo 2^64 (Newton's iteration, each step doubles the right bits).
fn reciprocal(odd: u64) -> u64 {
    (0..6).fold(odd, |inverse, _| inverse.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(inverse))))
}

fn taken(step: &Step, value: &Values) -> Values {
    match step {
        Step::Entry(i) => value.with(&value.shape[1..], |index| value.at(&[&[*i], index].concat())),
        Step::Part { axis, start, stop } => value.taken(*axis, &(*start..*stop).collect::<Vec<_>>()),
        Step::Reshape(shape) => Values { shape: shape.clone(), ..value.clone() },
        Step::Transpose(axes) => {
            let shape: Vec<_> = axes.iter().map(|axis| value.shape[*axis]).collect();
            let place = |axis: usize| axes.iter().position(|from| *from == axis).expect("a permutation");
            value.with(&shape, |index| value.at(&(0..axes.len()).map(|axis| index[place(axis)]).collect::<Vec<_>>()))
        }
        Step::View(dtype) => {
            let (last, bytes, size) = (value.shape.len() - 1, value.bytes(), dtype.size());
            let mut words = bytes.chunks(size as usize).map(|word| word.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte)));
            Values::new(*dtype, &moved(&value.shape, last, value.shape[last] * value.dtype.size() / size), |_| {
                words.next().expect("enough")
            })
        }
        Step::Subtract(addend) => value.map(|_, element| element.wrapping_sub(u64::from(addend.to_bits()))),
        Step::Divide(factor) => value.map(|_, element| element.wrapping_mul(reciprocal(u64::from(factor.to_bits() | 1)))),
        Step::DivideRows(runs) => {
            let factors: Vec<u64> =
                runs.iter().flat_map(|(rows, factor)| vec![reciprocal(u64::from(factor.to_bits() >> 8 | 1)); *rows as usize]).collect();
            value.map(|index, element| element.wrapping_mul(factors[index[0] as usize]))
        }
    }
}

/// The tensors of the checkpoint after the assignments.
fn assigned(assignments: &[Assignment], value: &Values) -> BTreeMap<String, Values> {
    let mut tensors = BTreeMap::new();
    for Assignment { source: of, spans, steps } in assignments {
        let new = steps.iter().fold(value.clone(), |value, step| taken(step, &value));
        let counts: Vec<_> = spans.iter().map(Span::count).collect();
        assert_eq!((new.dtype, &new.shape), (of.dtype, &counts));
        let tensor = tensors.entry(of.name.clone()).or_insert_with(|| source(of));
        new.with(&counts, |index| {
            let entry = |(i, span): (&u64, &Span)| span.start + i * span.step;
            let flat = index.iter().zip(spans).map(entry).zip(&of.shape).fold(0, |flat, (at, dim)| flat * dim + at);
            tensor.elements[flat as usize] = new.at(index);
            0
        });
    }
    tensors
}

#[test]
fn a_recipe_makes_what_its_assignments_say() {
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    let (mut undone, mut refused) = (0, 0);
    for round in 0..6000 {
        let mut tensor = random.float();
        for _ in 0..random.below(7) {
            tensor = random.step(tensor);
        }
        let Ok(assignments) = tensor.recipe.undo() else {
            refused += 1;
            continue;
        };
        undone += 1;
        let new = Values::new(tensor.dtype, &tensor.shape, |_| random.next());
        let tensors = assigned(&assignments, &new);
        let made = evaluated_of(&tensor.recipe, &|of| tensors.get(&of.name).cloned().unwrap_or_else(|| source(of)));
        assert_eq!(made, new, "round {round}: {tensor:?}");
    }
    assert!(undone > 1000 && refused > 1000, "{undone} {refused}");
}

#[test]
fn only_the_entries_of_a_part_are_assigned() {
    let fused = SymbolicTensor::of_checkpoint("qkv", DType::BF16, vec![8, 4]);
    let key = fused.clone().slice(0, 2, 5).expect("rows");
    let assignments = key.recipe.undo().expect("a box");
    assert_eq!(assignments.len(), 1);
    assert_eq!((assignments[0].spans[0], assignments[0].spans[1]), (Span::new(2, 5, 1), Span::whole(4)));
    assert!(assignments[0].steps.is_empty() && !assignments[0].is_whole());
    let part = |start, step| fused.clone().every(0, start, step).expect("rows").recipe;
    let (even, odd, third) = (part(0, 2), part(1, 2), part(0, 3));
    let meet = |a: &Recipe, b: &Recipe| a.undo().expect("a box")[0].meets(&b.undo().expect("a box")[0]);
    assert!(!meet(&even, &odd) && meet(&even, &third) && meet(&odd, &third) && meet(&even, &even));
}

#[test]
fn what_has_no_way_back_says_why() {
    let float = || SymbolicTensor::of_checkpoint("x", DType::BF16, vec![8, 64]);
    let message = |tensor: SymbolicTensor| tensor.recipe.undo().expect_err("refused").to_string();
    assert_eq!(message(float().normalise_columns(1e-6).expect("valid")), "`x` is normalised on loading, which has no way back");
    assert!(message(SymbolicTensor::concatenate(vec![float(), float()], 0).expect("valid")).contains("`x` is used twice"));
    assert!(message(float().scale(0.0).expect("valid")).contains("multiplied by 0"));
    let fp8 = SymbolicTensor::of_checkpoint("w", DType::U8, vec![8, 8]);
    let scales = SymbolicTensor::of_checkpoint("s", DType::F32, vec![1, 1]);
    assert!(message(fp8.dequantise_fp8(scales, Some([128, 128])).expect("blocks")).contains("`w` is widened from fp8"));
}
