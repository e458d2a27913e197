//! The rates of mlx 0.32: `mlx_lm.tuner.utils.build_schedule` on `mx.array(step, mx.uint64)`, as the optimizer calls it, bit for bit.

use super::*;

const STEPS: [u64; 12] = [0, 1, 2, 7, 10, 11, 12, 50, 101, 110, 334, 5000];

fn warmup(init: f64, steps: u64) -> Option<Warmup> {
    Some(Warmup { init, steps })
}

#[test]
#[rustfmt::skip]
fn rates_are_those_of_mlx() {
    let golden: [(Option<Warmup>, Decay, [u32; 12]); 24] = [
        (None, Decay::Cosine { init: 1e-05, steps: 1000, end: 0.0 }, [0x3727c5ac, 0x3727c590, 0x3727c53f, 0x3727c07b, 0x3727bb13, 0x3727b8da, 0x3727b66a, 0x3726bd48, 0x372395ab, 0x3722d019, 0x36fb5a8e, 0x00000000]),
        (warmup(0.0, 10), Decay::Cosine { init: 1e-05, steps: 1000, end: 0.0 }, [0x00000000, 0x358637bd, 0x360637bd, 0x36eae18b, 0x3727c5ac, 0x3727c5ac, 0x3727c590, 0x372724b0, 0x372470fd, 0x3723bf5d, 0x37002a3b, 0x00000000]),
        (warmup(1e-07, 100), Decay::Cosine { init: 1e-05, steps: 1000, end: 0.0 }, [0x33d6bf95, 0x3455acb4, 0x349ffccf, 0x3554de8c, 0x35924c1d, 0x359f95ba, 0x35acdf57, 0x36a9732b, 0x3727c5ac, 0x3727bd17, 0x371248ca, 0x00000000]),
        (None, Decay::Cosine { init: 0.1, steps: 37, end: 0.003 }, [0x3dcccccd, 0x3dcc7132, 0x3dcb5f0b, 0x3dbbc426, 0x3dab1873, 0x3da48925, 0x3d9d8ce7, 0x3b449ba6, 0x3b449ba6, 0x3b449ba6, 0x3b449ba6, 0x3b449ba6]),
        (warmup(0.0, 10), Decay::Cosine { init: 0.1, steps: 37, end: 0.003 }, [0x00000000, 0x3c23d70a, 0x3ca3d70a, 0x3d8f5c29, 0x3dcccccc, 0x3dcccccd, 0x3dcc7132, 0x3b449ba6, 0x3b449ba6, 0x3b449ba6, 0x3b449ba6, 0x3b449ba6]),
        (warmup(1e-07, 100), Decay::Cosine { init: 0.1, steps: 37, end: 0.003 }, [0x33d6bf95, 0x3a8315c1, 0x3b031413, 0x3be56109, 0x3c23d76b, 0x3c3439b7, 0x3c449c04, 0x3d4cccda, 0x3dcccccd, 0x3db12eb5, 0x3b449ba6, 0x3b449ba6]),
        (None, Decay::Exponential { init: 0.1, rate: 0.9 }, [0x3dcccccd, 0x3db851eb, 0x3da5e353, 0x3d43e90f, 0x3d0ed193, 0x3d00896b, 0x3ce75dc0, 0x3a071a5b, 0x36206cd0, 0x35789b95, 0x24705b02, 0x00000000]),
        (warmup(0.0, 10), Decay::Exponential { init: 0.1, rate: 0.9 }, [0x00000000, 0x3c23d70a, 0x3ca3d70a, 0x3d8f5c29, 0x3dcccccc, 0x3dcccccd, 0x3db851eb, 0x3ad74312, 0x36ff9bb0, 0x36460e3e, 0x253f7b3d, 0x00000000]),
        (warmup(1e-07, 100), Decay::Exponential { init: 0.1, rate: 0.9 }, [0x33d6bf95, 0x3a8315c1, 0x3b031413, 0x3be56109, 0x3c23d76b, 0x3c3439b7, 0x3c449c04, 0x3d4cccda, 0x3dcccccd, 0x3d1eaff9, 0x2c196b82, 0x00000000]),
        (None, Decay::Exponential { init: 0.0003, rate: 0.9995 }, [0x399d4952, 0x399d3530, 0x399d2110, 0x399cbc99, 0x399c8070, 0x399c6c67, 0x399c5861, 0x399966e0, 0x399589d6, 0x3994dde8, 0x398516cf, 0x37ce6ba1]),
        (warmup(0.0, 10), Decay::Exponential { init: 0.0003, rate: 0.9995 }, [0x00000000, 0x37fba882, 0x387ba882, 0x395c3372, 0x399d4951, 0x399d4952, 0x399d3530, 0x399a3f86, 0x39965d08, 0x3995b026, 0x3985d2c5, 0x37cf8f28]),
        (warmup(1e-07, 100), Decay::Exponential { init: 0.0003, rate: 0.9995 }, [0x33d6bf95, 0x364ff86a, 0x36cc9d6b, 0x37b0f0df, 0x37fc69c8, 0x380ac90b, 0x38175d32, 0x391d56bd, 0x399d4952, 0x399c947b, 0x398bfc1c, 0x37d91d99]),
        (None, Decay::Step { init: 0.1, rate: 0.9, size: 10 }, [0x3dcccccd, 0x3dcccccd, 0x3dcccccd, 0x3dcccccd, 0x3db851eb, 0x3db851eb, 0x3db851eb, 0x3d71dd5b, 0x3d0ed193, 0x3d00896b, 0x3b4a86d8, 0x17cc93ee]),
        (warmup(0.0, 10), Decay::Step { init: 0.1, rate: 0.9, size: 10 }, [0x00000000, 0x3c23d70a, 0x3ca3d70a, 0x3d8f5c29, 0x3dcccccc, 0x3dcccccd, 0x3dcccccd, 0x3d954c97, 0x3d1eaff9, 0x3d1eaff9, 0x3b61079b, 0x17fc90b5]),
        (warmup(1e-07, 100), Decay::Step { init: 0.1, rate: 0.9, size: 10 }, [0x33d6bf95, 0x3a8315c1, 0x3b031413, 0x3be56109, 0x3c23d76b, 0x3c3439b7, 0x3c449c04, 0x3d4cccda, 0x3dcccccd, 0x3dcccccd, 0x3c1135d6, 0x18a2fa93]),
        (None, Decay::Step { init: 0.0002, rate: 0.5, size: 100 }, [0x3951b717, 0x3951b717, 0x3951b717, 0x3951b717, 0x3951b717, 0x3951b717, 0x3951b717, 0x3951b717, 0x38d1b717, 0x38d1b717, 0x37d1b717, 0x2051b717]),
        (warmup(0.0, 10), Decay::Step { init: 0.0002, rate: 0.5, size: 100 }, [0x00000000, 0x37a7c5ac, 0x3827c5ac, 0x3912ccf6, 0x3951b717, 0x3951b717, 0x3951b717, 0x3951b717, 0x3951b717, 0x3951b717, 0x37d1b717, 0x20d1b717]),
        (warmup(1e-07, 100), Decay::Step { init: 0.0002, rate: 0.5, size: 100 }, [0x33d6bf95, 0x360cdc8c, 0x3689818d, 0x376c70f9, 0x37a886f3, 0x37b94bc5, 0x37ca1096, 0x38d1d1ef, 0x3951b717, 0x3951b717, 0x3851b717, 0x2151b717]),
        (None, Decay::Linear { init: 0.0, end: 0.1, steps: 100 }, [0x00000000, 0x3a83126f, 0x3b03126f, 0x3be56042, 0x3c23d70b, 0x3c343959, 0x3c449ba6, 0x3d4ccccd, 0x3dcccccd, 0x3dcccccd, 0x3dcccccd, 0x3dcccccd]),
        (warmup(0.0, 10), Decay::Linear { init: 0.0, end: 0.1, steps: 100 }, [0x00000000, 0x00000000, 0x00000000, 0x00000000, 0x00000000, 0x00000000, 0x3a83126f, 0x3d1fbe77, 0x3db851ec, 0x3dcac084, 0x3dcccccd, 0x3dcccccd]),
        (warmup(1e-07, 100), Decay::Linear { init: 0.0, end: 0.1, steps: 100 }, [0x33d6bf95, 0x33d499d4, 0x33d27412, 0x33c7b74b, 0x33c14606, 0x33bf2045, 0x33bcfa83, 0x3356bf96, 0x00000000, 0x3c1374bd, 0x3dcccccd, 0x3dcccccd]),
        (None, Decay::Linear { init: 0.0001, end: 1e-06, steps: 333 }, [0x38d1b717, 0x38d1177b, 0x38d077df, 0x38cd59d1, 0x38cb7afd, 0x38cadb60, 0x38ca3bc4, 0x38b28a94, 0x3892be74, 0x388d21f6, 0x35863780, 0x35863780]),
        (warmup(0.0, 10), Decay::Linear { init: 0.0001, end: 1e-06, steps: 333 }, [0x00000000, 0x3727c5ac, 0x37a7c5ac, 0x3892ccf6, 0x38d1b717, 0x38d1b717, 0x38d1177b, 0x38b9664a, 0x38999a2a, 0x3893fdac, 0x36854f90, 0x35863780]),
        (warmup(1e-07, 100), Decay::Linear { init: 0.0001, end: 1e-06, steps: 333 }, [0x33d6bf95, 0x3593815a, 0x360ccb5e, 0x36ee0068, 0x37294838, 0x373a0ae4, 0x374acd91, 0x3851ecc8, 0x38d1b717, 0x38cc1a99, 0x3800e3ca, 0x35863780]),
    ];
    for (warmup, decay, bits) in golden {
        let schedule = Schedule { warmup, decay };
        for (step, bits) in STEPS.into_iter().zip(bits) {
            let (ours, theirs) = (schedule.at(step), f32::from_bits(bits));
            assert_eq!(ours.to_bits(), bits, "{schedule:?} at {step}: {ours:e}, mlx {theirs:e}");
        }
    }
}

#[test]
fn a_constant_rate_is_the_nearest_f32() {
    assert_eq!([0, 1, 9999].map(|step| Schedule::constant(1e-5).at(step)), [1e-5_f32; 3]);
}
