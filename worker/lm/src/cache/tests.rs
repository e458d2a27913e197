//! What caches promise, on tokens that are numbers.

use super::*;
use mlx_cluster_common::cache::{CacheOptions, KvQuantization};

const DIM: i32 = 32;

/// Token `t` is `t` in all its numbers.
fn tokens(from: i32, n: i32) -> Array {
    let values: Vec<f32> = (from..from + n).flat_map(|value| [value as f32; DIM as usize]).collect();
    Array::from_slice(&values, &[1, 1, n, DIM])
}

/// The first number of each token.
fn numbers(array: &Array) -> Vec<f32> {
    array.to_vec_exact::<f32>().expect("floats").chunks(DIM as usize).map(|token| token[0]).collect()
}

fn range(from: i32, to: i32) -> Vec<f32> {
    (from..to).map(|value| value as f32).collect()
}

fn plain(seen: &Seen) -> Vec<f32> {
    numbers(seen.plain().expect("not quantised").0)
}

fn append(cache: &mut KvCache, n: i32) -> Vec<Seen> {
    let length = cache.length();
    cache.extend(&[&tokens(length, n), &tokens(1000 + length, n)]).expect("appended");
    cache.seen(n).expect("read")
}

fn quantised(start: u32) -> CacheOptions {
    let quantization = KvQuantization::new(8, Some(32), Some(start)).expect("allowed");
    CacheOptions::new(Some(quantization), None).expect("allowed")
}

fn limited(size: u32) -> CacheOptions {
    CacheOptions::new(None, Some(size)).expect("allowed")
}

#[test]
fn what_was_appended_comes_back_in_order_across_growth() {
    let mut cache = KvCache::default();
    let mut length = 0;
    for n in [3, 1, 255, 300, 1] {
        cache.extend(&[&tokens(length, n), &tokens(1000 + length, n)]).expect("appended");
        let ([keys, values], _) = cache.seen_arrays(n).expect("held");
        length += n;
        assert_eq!(numbers(&keys), range(0, length));
        assert_eq!(numbers(&values)[0], 1000.0);
        assert_eq!(cache.length(), length);
    }
}

#[test]
fn a_window_sees_its_tokens_and_forgets_the_rest() {
    let mut cache = KvCache::with_window(Some(4));
    let mut length = 0;
    for n in [3, 1, 255, 300, 1, 1, 700, 2] {
        let seen = append(&mut cache, n);
        assert_eq!(plain(&seen[0]), range((length - 3).max(0), length + n), "{n} tokens at {length}");
        length += n;
    }
    assert!(cache.arrays().all(|buffer| buffer.dim(2) <= 1024));
}

#[test]
fn tokens_are_taken_back_where_nothing_was_forgotten() {
    let mut cache = KvCache::with_window(Some(4));
    append(&mut cache, 200);
    assert!(cache.can_trim(5));
    cache.trim(5);
    assert_eq!(plain(&append(&mut cache, 1)[0]), range(192, 196));
    append(&mut cache, 400);
    let mut cache = Cache::Attention(cache);
    assert!(cache.trim(390));
    assert!(!cache.trim(200), "the window before it is gone");
    assert!(cache.trim(206), "but a sequence can always begin anew");
    assert!(!Cache::Recurrent(RecurrentState { arrays: vec![tokens(0, 1)] }).trim(1));
}

#[test]
fn a_limited_cache_keeps_the_first_tokens_and_the_last() {
    let mut cache = KvCache::new(None, &limited(10));
    let mut length = 0;
    for n in [3, 1, 4, 1, 1, 1, 1, 5, 1, 30, 2, 1, 1, 1, 1, 1, 1, 1, 1] {
        let seen = append(&mut cache, n);
        let mut found = plain(&seen[0]);
        // Single tokens stand in any order.
        found.sort_by(f32::total_cmp);
        let first = (length - 5).max(4);
        let wanted = if length + n <= 10 { range(0, length + n) } else { [range(0, 4), range(first, length + n)].concat() };
        assert_eq!(found, wanted, "{n} tokens at {length}");
        assert_eq!(seen[0].reach().window.map(|window| window.size()), Some(10));
        length += n;
        assert!(cache.arrays().all(|buffer| buffer.dim(2) <= 9 + n.max(1)), "{n} tokens at {length}");
    }
}

#[test]
fn a_limited_cache_takes_back_what_was_not_replaced() {
    let mut cache = Cache::Attention(KvCache::new(None, &limited(10)));
    let append = |cache: &mut Cache, n: i32| match cache {
        Cache::Attention(cache) => plain(&append(cache, n)[0]),
        _ => Vec::new(),
    };
    append(&mut cache, 9);
    assert!(cache.trim(2));
    assert_eq!(append(&mut cache, 2), range(0, 9));
    append(&mut cache, 6);
    append(&mut cache, 6);
    assert!(!cache.trim(7) && cache.trim(6));
    assert_eq!(append(&mut cache, 1), [range(0, 4), range(10, 16)].concat());
    append(&mut cache, 1);
    assert!(!cache.trim(1));
    assert!(cache.trim(17));
    assert_eq!(append(&mut cache, 2), range(0, 2));
}

#[test]
fn tokens_before_the_start_see_others_as_they_are() {
    let mut cache = KvCache::new(None, &quantised(20));
    assert_eq!(plain(&append(&mut cache, 18)[0]), range(0, 18));
    let [before, after] = <[Seen; 2]>::try_from(append(&mut cache, 5)).expect("cut at the start");
    assert_eq!((before.reach().n, plain(&before)), (2, range(0, 20)));
    assert_eq!((after.reach().n, after.reach().held, after.plain().is_some()), (3, 23, false));
    // Only the last one is asked for, as where a prompt's logits are not wanted.
    let last = cache.seen(1).expect("read");
    assert_eq!((last.len(), last[0].reach().held), (1, 23));
    assert_eq!(append(&mut cache, 1).len(), 1);
}

#[test]
fn the_first_token_of_all_sees_itself_as_it_is() {
    let mut cache = KvCache::new(None, &quantised(0));
    let [first, others] = <[Seen; 2]>::try_from(append(&mut cache, 7)).expect("cut after the first");
    assert_eq!((first.reach().n, plain(&first)), (1, range(0, 1)));
    assert_eq!((others.reach().n, others.reach().held), (6, 7));
    assert!(cache.arrays().all(|array| array.dtype() != mlx_rs::Dtype::Float32 || array.dim(3) == 1));
}

#[test]
fn quantised_tokens_come_back_through_windows_and_limits() {
    let options = CacheOptions { max_kv_size: Some(10), ..quantised(3) };
    for (window, size) in [(None, 10), (Some(6), 6)] {
        let mut cache = KvCache::new(window, &options);
        append(&mut cache, 2);
        for n in [4, 1, 1, 1, 1, 1, 1, 7, 1, 300, 1] {
            let seen = append(&mut cache, n);
            let last = seen.last().expect("something");
            let (keys, _) = last.matrices().expect("matrices");
            let first_numbers = keys.apply_each(&unit(), true).expect("multiplies");
            let mut found: Vec<f32> = first_numbers.to_vec_exact().expect("floats");
            found.sort_by(f32::total_cmp);
            let length = cache.length();
            let newest = found.last().copied().unwrap_or_default();
            assert!((newest - (length - 1) as f32).abs() < 0.01, "{newest} of {length}");
            assert!(last.reach().held <= size + n, "{} held", last.reach().held);
        }
    }
}

/// One in the first of its numbers.
fn unit() -> Array {
    Array::from_iter((0..DIM).map(|i| if i == 0 { 1.0f32 } else { 0.0 }), &[1, 1, 1, 1, DIM])
}

#[test]
fn quantised_tokens_are_taken_back_to_the_start_and_no_further() {
    let mut cache = Cache::Attention(KvCache::new(None, &quantised(20)));
    let Cache::Attention(kv) = &mut cache else { unreachable!() };
    append(kv, 30);
    assert!(cache.trim(10));
    assert!(!cache.trim(1), "token 19 would see quantised ones");
    assert!(cache.trim(20));
    let Cache::Attention(kv) = &mut cache else { unreachable!() };
    assert_eq!(plain(&append(kv, 2)[0]), range(0, 2));
}
